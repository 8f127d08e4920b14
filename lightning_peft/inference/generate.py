"""Text from a causal language model: batches of prompts, or one streamed token by token."""

from collections import deque
from collections.abc import Collection, Generator, Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lightning_peft.inference.answer_rows import AnswerRows
from lightning_peft.inference.by_transformers import generated, generated_tokens, say_once
from lightning_peft.inference.continuous_batching import Decoder
from lightning_peft.inference.own_settings import settings_not_decoded
from lightning_peft.inference.prompt_batches import common_prefix
from lightning_peft.inference.sampling import SamplingConfig
from lightning_peft.inference.static_steps import StaticSteps, why_not_static
from lightning_peft.inference.steps import PREFILL_TOKENS
from lightning_peft.inference.token_ids import check_token_ids
from lightning_peft.progress import Part

USUAL_TOKENS = 256
"""Tokens of an answer that room is made for even beyond the model's context; a cache grows for longer ones."""
JOIN_SHARE = 0.25
"""Share of a batch's places that is free before further prompts run."""


@torch.inference_mode()
def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[list[int]],
    sampling: SamplingConfig,
    batch_size: int = 32,
    stops: Collection[int] = (),
) -> list[str]:
    """Return the answer to each prompt (token ids), in the order given: the answer it gets alone.

    The beginning that all prompts share - a system prompt, solved examples - runs through the model once where its
    cache can be repeated. `stops` are tokens that end answers beside those of tokenizer and model: a layout's. A model
    in training drops nothing meanwhile, and the global random state stays as it is.
    """
    if not prompts:
        return []
    check_token_ids(model, prompts)
    with Part("answers", len(prompts)) as part, in_eval_mode(model):
        answers = AnswerRows(model, tokenizer, prompts, sampling, stops, part.advance)
        if is_decoded(model):
            decode(model, answers, sampling, batch_size)
        else:
            generated(model, answers, sampling, batch_size)
    return answers.texts()


def generate_stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompt: list[int],
    sampling: SamplingConfig,
    stops: Collection[int] = (),
) -> Iterator[str]:
    """Return the pieces of the answer to one prompt (token ids) as they come; `stops` as for a batch.

    Raises ValueError, also while they come, where the scores of a token are not finite.
    """
    check_token_ids(model, [prompt])
    answers = AnswerRows(model, tokenizer, [prompt], sampling, stops)
    tokens = decoded_tokens(model, answers) if is_decoded(model) else generated_tokens(model, answers, sampling)
    return answers.pieces(tokens)


@contextmanager
def in_eval_mode(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def is_decoded(model: PreTrainedModel) -> bool:
    """Return whether a model's answers come from our decoder; say why where they do not."""
    if (reason := why_not_decoded(model)) is None:
        return True
    say_once(f"{type(model).__name__}: answers come from transformers' generate, slower, as {reason}")
    return False


def why_not_decoded(model: PreTrainedModel) -> str | None:
    """Return why a model's answers come from transformers' `generate`; None where they come from our decoder."""
    if changed := settings_not_decoded(model):
        return f"its generation_config.json sets {', '.join(changed)}"
    return why_not_static(model)


def decode(model: PreTrainedModel, answers: AnswerRows, sampling: SamplingConfig, batch_size: int) -> None:
    """Write all answers by our decoder: the next prompts take the places of answers that ended."""
    decoder = Decoder(model)
    assert isinstance(decoder.steps, StaticSteps)
    prompts = [row.prompt for row in answers.rows]
    if len(prompts) > 1 and (prefix := common_prefix(prompts)):
        decoder.steps.share(prompts[0][:prefix])
    # The longest first, so that neighbours are of a length and the cache is as wide as it has to be from the start.
    waiting = deque(sorted(answers.rows, key=lambda row: -len(row.prompt)))
    longest = len(waiting[0].prompt)
    width = min(longest + sampling.max_new_tokens, max(answers.context or 0, longest + USUAL_TOKENS))
    batch_size = decoder.steps.reserve(min(batch_size, len(prompts)), width)
    while waiting or decoder.rows:
        free = batch_size - len(decoder.rows)
        # Several prompts at once make better use of the weights that are read for them.
        if waiting and (free >= batch_size * JOIN_SHARE or not decoder.rows):
            together = max(1, PREFILL_TOKENS // len(waiting[0].prompt))
            decoder.add(*(waiting.popleft() for _ in range(min(len(waiting), free, together))))
        elif decoder.rows:
            decoder.step()


def decoded_tokens(model: PreTrainedModel, answers: AnswerRows) -> Generator[int, None, None]:
    """Yield the tokens of the only answer as our decoder has them."""
    (row,), decoder = answers.rows, Decoder(model)
    decoder.add(row)
    yield from row.tokens
    while decoder.rows:
        before = len(row.tokens)
        decoder.step()
        yield from row.tokens[before:]
