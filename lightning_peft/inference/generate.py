"""Text from a causal language model: batches of prompts, or one streamed token by token."""

import copy
import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache
from itertools import groupby
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
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
from lightning_peft.inference.sampling import SamplingConfig
from lightning_peft.inference.steps import (
    PREFILL_TOKENS,
    StaticSteps,
    cache_keyword,
    can_repeat_prefix,
    why_not_static,
)
from lightning_peft.inference.token_ids import check_token_ids
from lightning_peft.models.rope import follows_length, table_of_positions
from lightning_peft.progress import Part
from lightning_peft.quantization.weights import computing_dtype

logger = logging.getLogger(__name__)

CHECKED_TOKENS = 4
"""Tokens generated to see whether a prompt in a batch is answered as it is alone."""
CLOSE, CLOSE_IN_16_BITS = 1e-4, 2**-4
"""Largest difference of two logits, as a share of the largest, taken for the rounding of another batch."""
JOIN_SHARE = 0.25
"""Share of a batch's places that is free before further prompts run."""
OWN_ERRORS = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)
"""Errors of a model's code for a batch or a cache that it was never run with."""
TRIED_TOKENS = 8
"""Tokens of a prompt with which it is tried whether a model takes the cache that transformers makes for it."""
CHANGE_SCORES = (
    "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens",
    "begin_suppress_tokens", "sequence_bias", "forced_bos_token_id", "forced_eos_token_id", "min_length",
    "min_new_tokens", "exponential_decay_length_penalty", "token_healing", "watermarking_config", "guidance_scale",
)  # fmt: skip
"""Settings of a model's own generation config by which transformers changes the scores, also of greedy answers."""


def declared_end_ids(model: PreTrainedModel) -> set[int]:
    """Return the tokens at which the model's own `generation_config.json` says that an answer ends."""
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def generation_config(
    sampling: SamplingConfig, tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel
) -> GenerationConfig:
    draws = sampling.temperature > 0
    # transformers draws among 50 tokens where nobody says how many.
    options = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if draws else {}
    ends = sorted(end_token_ids(tokenizer) | declared_end_ids(model))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=draws,
        eos_token_id=ends or None,
        pad_token_id=pad,
        stop_strings=getattr(model.generation_config, "stop_strings", None),
        **own_scores(model),
        **options,
    )


def own_scores(model: PreTrainedModel) -> dict[str, Any]:
    """Return what the model's own generation config sets of `CHANGE_SCORES`."""
    declared = model.generation_config
    return {name: value for name in CHANGE_SCORES if (value := getattr(declared, name, None)) is not None}


def room_for(model: PreTrainedModel, prompts: list[list[int]], most: int) -> list[int]:
    """Return how many of `most` tokens each prompt's answer may have, as a model's positions may come to an end.

    Raises ValueError for a prompt that leaves none.
    """
    if (positions := table_of_positions(model)) is None:
        return [most] * len(prompts)
    if (longest := max(map(len, prompts))) >= positions:
        raise ValueError(
            f"a prompt has {longest:,} tokens, and {type(model).__name__} has {positions:,} positions for prompt and "
            "answer: shorten the prompt"
        )
    return [min(most, positions - len(prompt)) for prompt in prompts]


@contextmanager
def only_what_is_asked(model: PreTrainedModel) -> Iterator[None]:
    """Keep the model's `generate`, inside the block, from any setting of the model's own generation config.

    Without it, `generate` takes all that it is not told from there: beams, several answers, times, kinds of caches and
    of outputs.
    """
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def pad_left(prompts: list[list[int]], prefix: int, pad_id: int, device: torch.device) -> dict[str, Tensor]:
    """Return input_ids and attention_mask, (B, T) int64: common prefix, padding, the rest at the right edge."""
    width = max(map(len, prompts))
    gaps = [width - len(prompt) for prompt in prompts]
    ids = [p[:prefix] + [pad_id] * gap + p[prefix:] for p, gap in zip(prompts, gaps, strict=True)]
    mask = [[1] * prefix + [0] * gap + [1] * (width - prefix - gap) for gap in gaps]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def common_prefix(prompts: list[list[int]]) -> int:
    """Return the number of leading tokens all prompts share, at least one token of each prompt left out."""
    first, last = min(prompts), max(prompts)
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return min(shared, min(map(len, prompts)) - 1)


class Batching(Enum):
    """Ways to put prompts side by side, the fastest first."""

    shared_prefix = "what all prompts begin with runs once, and padding follows it"
    left_padding = "prompts are padded on the left"
    equal_length = "prompts of one length share a batch"
    alone = "one prompt runs at a time"


@dataclass
class Prompts:
    """Prompts of one call, and how this model takes several of them at once."""

    model: PreTrainedModel
    batching: Batching
    prefix: int = 0
    """Tokens that run once, before padding."""
    cache: DynamicCache | None = None
    """Keys and values of the prefix."""
    use_cache: bool = True
    """True where a token is computed from what is kept of those before it, not from all of them anew."""

    def inputs(self, prompts: list[list[int]], pad_id: int) -> dict[str, Any]:
        """Return the arguments of the model's `generate` for a batch."""
        inputs: dict[str, Any] = pad_left(prompts, self.prefix, pad_id, self.model.device)
        if self.cache is not None:
            repeated = copy.deepcopy(self.cache)
            repeated.batch_repeat_interleave(len(prompts))
            inputs[str(cache_keyword(self.model))] = repeated
        return inputs


@torch.inference_mode()
def choose_batching(model: PreTrainedModel, prompts: list[list[int]], pad_id: int, use_cache: bool = True) -> Prompts:
    """Return the fastest way to batch in which the shortest prompt beside another one gets the logits it gets alone."""
    shortest, longest = min(prompts, key=len), max(prompts, key=len)
    prefix = common_prefix(prompts)
    ways = [Prompts(model, way, use_cache=use_cache) for way in (Batching.left_padding, Batching.equal_length)]
    if follows_length(model.config, None):  # padded rows reach the next frequencies at another token than alone
        ways = ways[1:]
    elif prefix and use_cache and can_repeat_prefix(model):
        cache = DynamicCache(config=model.config)
        ids = torch.tensor([shortest[:prefix]], device=model.device)
        model(input_ids=ids, **{str(cache_keyword(model)): cache})
        ways.insert(0, Prompts(model, Batching.shared_prefix, prefix, cache))
    expected = first_logits(ways[-1], [shortest], pad_id)
    for way in ways:
        other = shortest[::-1] if way.batching is Batching.equal_length else longest
        try:
            logits = first_logits(way, [shortest, other], pad_id)
        except torch.OutOfMemoryError:  # that failure says nothing of the model
            raise
        except OWN_ERRORS as error:
            logger.info("%s cannot run where %s: %s", type(model).__name__, way.batching.value, error)
            continue
        if is_close(logits, expected, computing_dtype(model)):
            return way
        logger.info("%s answers otherwise than alone where %s: done slower", type(model).__name__, way.batching.value)
    return Prompts(model, Batching.alone, use_cache=use_cache)


def first_logits(way: Prompts, prompts: list[list[int]], pad_id: int) -> Tensor:
    """Return the logits (CHECKED_TOKENS, V) of the first tokens of the first prompt's greedy answer."""
    config = GenerationConfig(
        max_new_tokens=CHECKED_TOKENS, do_sample=False, pad_token_id=pad_id, eos_token_id=None, output_logits=True,
        return_dict_in_generate=True, use_cache=way.use_cache, **own_scores(way.model),
    )  # fmt: skip
    with only_what_is_asked(way.model):
        output = way.model.generate(**way.inputs(prompts, pad_id), generation_config=config)  # type: ignore[operator]
    return torch.stack([logits[0] for logits in output.logits]).float()


def is_close(logits: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Return whether logits are equal but for the rounding of another batch's products.

    Where the first choices part, what follows is of other text, and no longer compared.
    """
    steps = min(len(logits), len(expected))  # an answer that ends early alone goes on beside a longer one
    logits, expected = logits[:steps], expected[:steps]
    same = (logits.argmax(-1) == expected.argmax(-1)).long().cumprod(0).bool()
    compared = torch.cat([same.new_ones(1), same[:-1]])
    difference = (logits - expected)[compared].abs().amax()
    return bool(difference <= (CLOSE if dtype is torch.float32 else CLOSE_IN_16_BITS) * expected.abs().amax())


def batches(prompts: list[list[int]], way: Batching, batch_size: int) -> Iterator[list[int]]:
    """Yield the indices of the prompts of each batch, by length."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    groups = [order]
    if way is Batching.alone:
        batch_size = 1
    if way is Batching.equal_length:
        groups = [list(group) for _, group in groupby(order, key=lambda i: len(prompts[i]))]
    for group in groups:
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


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


def settings_not_decoded(model: PreTrainedModel) -> dict[str, Any]:
    """Return what changes answers of a model's own generation config, and our decoder does not know."""
    changed = own_scores(model)
    if stops := getattr(model.generation_config, "stop_strings", None):
        changed["stop_strings"] = stops
    return {name: value for name, value in changed.items() if value and (value != 1.0 or "penalty" not in name)}


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
