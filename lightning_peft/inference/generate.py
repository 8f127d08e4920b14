"""Text from a causal language model: batches of prompts, or one streamed token by token."""

import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)

from lightning_peft.data.chat import end_token_ids
from lightning_peft.inference.continuous_batching import Choice, Decoder, RunningSequence
from lightning_peft.inference.own_settings import (
    declared_end_ids,
    generation_config,
    only_what_is_asked,
    room_for,
    settings_not_decoded,
)
from lightning_peft.inference.prompt_batches import (
    CHECKED_TOKENS,
    OWN_ERRORS,
    Batching,
    Prompts,
    batches,
    choose_batching,
    common_prefix,
    pad_left,
)
from lightning_peft.inference.sampling import SamplingConfig
from lightning_peft.inference.static_steps import StaticSteps, why_not_static
from lightning_peft.inference.steps import PREFILL_TOKENS
from lightning_peft.inference.token_ids import check_token_ids
from lightning_peft.progress import Part

logger = logging.getLogger(__name__)

JOIN_SHARE = 0.25
"""Share of a batch's places that is free before further prompts run."""
TRIED_TOKENS = 8
"""Tokens of a prompt with which it is tried whether a model takes the cache that transformers makes for it."""


class Counted(StoppingCriteria):
    """Advances a part by a batch of answers, token by token; it stops none of them."""

    def __init__(self, part: Part, answers: int, max_new_tokens: int):
        self.part = part
        self.left = float(answers)
        self.per_token = answers / max_new_tokens

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Any:
        self.part.advance(self.per_token)
        self.left -= self.per_token
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def end(self) -> None:
        """Count the tokens that the answers did not need."""
        self.part.advance(self.left)
        self.left = 0.0


@torch.inference_mode()
def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[list[int]],
    sampling: SamplingConfig,
    batch_size: int = 32,
) -> list[str]:
    """Return the answer to each prompt (token ids), in the order given: the answer it gets alone.

    The beginning that all prompts share - a system prompt, solved examples - runs through the model once where its
    cache can be repeated.
    """
    if not prompts:
        return []
    check_token_ids(model, prompts)
    with Part("answers", len(prompts)) as part:
        if (reason := why_not_decoded(model)) is None:
            return decoded(model, tokenizer, prompts, sampling, batch_size, part)
        say_once(f"{type(model).__name__}: answers come from transformers' generate, slower, as {reason}")
        return generated(model, tokenizer, prompts, sampling, batch_size, part)


@cache
def say_once(line: str) -> None:
    logger.info("%s", line)


@torch.inference_mode()
def takes_cache(model: PreTrainedModel, prompt: list[int], pad_id: int) -> bool:
    """Return whether a model runs with the cache that transformers' `generate` makes for it, by trying two tokens.

    Raises ValueError for one that gives no answers without a cache either.
    """
    inputs = pad_left([prompt[-TRIED_TOKENS:]], 0, pad_id, model.device)
    for use_cache in (True, False):
        config = GenerationConfig(
            max_new_tokens=2, do_sample=False, pad_token_id=pad_id, eos_token_id=None, use_cache=use_cache
        )
        try:
            with only_what_is_asked(model):
                model.generate(**inputs, generation_config=config)  # type: ignore[operator]
        except torch.OutOfMemoryError:  # that failure says nothing of the model
            raise
        except OWN_ERRORS as error:
            reason = " ".join(str(error).split())[:120]
            continue
        if not use_cache:
            say_once(f"{type(model).__name__}: each token is computed from all before it, as its cache fails: {reason}")
        return use_cache
    raise ValueError(f"{type(model).__name__} gives no answers: {reason}; it trains, scores its loss and merges")


def why_not_decoded(model: PreTrainedModel) -> str | None:
    """Return why a model's answers come from transformers' `generate`; None where they come from our decoder."""
    if changed := settings_not_decoded(model):
        return f"its generation_config.json sets {', '.join(changed)}"
    return why_not_static(model)


def decoded(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[list[int]],
    sampling: SamplingConfig,
    batch_size: int,
    part: Part,
) -> list[str]:
    """Return the answers of our decoder: the next prompts take the places of answers that ended."""
    ends = end_token_ids(tokenizer) | declared_end_ids(model)
    decoder = Decoder(model)
    assert isinstance(decoder.steps, StaticSteps)
    # The longest first, so that neighbours are of a length and the cache is as wide as it has to be from the start.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    rows = [answer_row(prompts[i], sampling, ends, i, part) for i in order]
    if len(prompts) > 1 and (prefix := common_prefix(prompts)):
        decoder.steps.share(prompts[0][:prefix])
    longest = len(prompts[order[0]])
    batch_size = decoder.steps.reserve(min(batch_size, len(prompts)), longest + sampling.max_new_tokens)
    waiting = deque(rows)
    while waiting or decoder.rows:
        free = batch_size - len(decoder.rows)
        # Several prompts at once make better use of the weights that are read for them.
        if waiting and (free >= batch_size * JOIN_SHARE or not decoder.rows):
            together = max(1, PREFILL_TOKENS // len(waiting[0].prompt))
            decoder.add(*(waiting.popleft() for _ in range(min(len(waiting), free, together))))
        elif decoder.rows:
            decoder.step()
    texts = tokenizer.batch_decode([row.tokens for row in rows], skip_special_tokens=True)
    return [text for _, text in sorted(zip(order, texts, strict=True))]


def answer_row(
    prompt: list[int], sampling: SamplingConfig, ends: set[int], number: int, part: Part | None
) -> RunningSequence:
    """Return the row of one answer; equal prompts of a call draw different ones."""
    share = 1 / sampling.max_new_tokens
    counted = 0

    def goes_on(choice: Choice) -> bool:
        nonlocal counted
        counted += 1
        is_end = choice.token in ends
        if part is not None:
            part.advance(share if not is_end else 1 - share * (counted - 1))
        return not is_end

    seeded = replace(sampling, seed=sampling.seed + number)
    return RunningSequence(prompt, seeded, goes_on, wants_logprobs=False)


def generated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[list[int]],
    sampling: SamplingConfig,
    batch_size: int,
    part: Part,
) -> list[str]:
    """Return the answers of transformers' `generate`; how prompts share a batch is tried on two of them first.

    An answer that may be cut by the end of the model's positions comes alone, where that end is its own.
    """
    most = max(sampling.max_new_tokens, CHECKED_TOKENS)
    room = room_for(model, prompts, most)
    short = [i for i, left in enumerate(room) if left < most]
    free = [i for i in range(len(prompts)) if i not in set(short)]
    config = generation_config(sampling, tokenizer, model)
    pad_id = config.pad_token_id
    config.use_cache = takes_cache(model, prompts[0], pad_id)
    way = Prompts(model, Batching.alone)
    if len(free) > 1:
        way = choose_batching(model, [prompts[i] for i in free], pad_id, config.use_cache)
    answers = [""] * len(prompts)
    torch.manual_seed(sampling.seed)
    groups = list(batches([prompts[i] for i in free], way.batching, batch_size))
    for rows in [*([free[i] for i in group] for group in groups), *([i] for i in short)]:
        config.max_new_tokens = min(sampling.max_new_tokens, room[rows[0]])
        inputs = way.inputs([prompts[i] for i in rows], pad_id)
        counted = StoppingCriteriaList([Counted(part, len(rows), sampling.max_new_tokens)])
        with only_what_is_asked(model):
            output = model.generate(  # type: ignore[operator]
                **inputs, generation_config=config, stopping_criteria=counted, tokenizer=tokenizer
            )
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, text in zip(rows, texts, strict=True):
            answers[row] = text
        counted[0].end()
    return answers


def generate_stream(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: list[int], sampling: SamplingConfig
) -> Iterator[str]:
    """Return the pieces of the answer to one prompt (token ids) as they come."""
    check_token_ids(model, [prompt])
    if (reason := why_not_decoded(model)) is None:
        return streamed(model, tokenizer, prompt, sampling)
    say_once(f"{type(model).__name__}: answers come from transformers' generate, slower, as {reason}")
    return generated_stream(model, tokenizer, prompt, sampling)


def streamed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: list[int], sampling: SamplingConfig
) -> Iterator[str]:
    """Yield the pieces of an answer of our decoder: whole words, as the next token may still change the last one."""
    decoder, streamer = Decoder(model), Pieces(tokenizer, skip_special_tokens=True)
    row = answer_row(prompt, sampling, end_token_ids(tokenizer) | declared_end_ids(model), 0, None)
    decoder.add(row)
    streamer.put(torch.tensor(row.tokens))
    while decoder.rows:
        decoder.step()
        streamer.put(torch.tensor(row.tokens[-1:]))
        yield from streamer.taken()
    streamer.end()
    yield from streamer.taken()


class Pieces(TextStreamer):
    """Text that is ready to be read."""

    ready: tuple[str, ...] = ()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.ready += (text,)

    def taken(self) -> tuple[str, ...]:
        ready, self.ready = self.ready, ()
        return ready


def generated_stream(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: list[int], sampling: SamplingConfig
) -> Iterator[str]:
    """Yield the pieces of an answer of transformers' `generate`, which runs in a thread."""
    config = generation_config(sampling, tokenizer, model)
    (config.max_new_tokens,) = room_for(model, [prompt], sampling.max_new_tokens)
    config.use_cache = takes_cache(model, prompt, config.pad_token_id)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    failure: list[BaseException] = []

    def run() -> None:
        try:
            torch.manual_seed(sampling.seed)
            with torch.inference_mode(), only_what_is_asked(model):
                inputs = pad_left([prompt], 0, config.pad_token_id, model.device)
                model.generate(  # type: ignore[operator]
                    **inputs, generation_config=config, streamer=streamer, tokenizer=tokenizer
                )
        except BaseException as error:  # the error is handed to the caller's thread below
            failure.append(error)
            streamer.end()

    thread = Thread(target=run, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if failure:
        raise failure[0]
