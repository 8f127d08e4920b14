"""Text from a causal language model: batches of prompts, or one streamed token by token."""

import copy
import inspect
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
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
)
from transformers.cache_utils import DynamicLayer

from lightning_peft.data.chat import end_token_ids
from lightning_peft.inference.sampling import SamplingConfig
from lightning_peft.progress import Part

logger = logging.getLogger(__name__)

CHECKED_TOKENS = 4
"""Tokens generated to see whether a prompt in a batch is answered as it is alone."""
CLOSE, CLOSE_IN_16_BITS = 1e-4, 2**-4
"""Largest difference of two logits, as a share of the largest, taken for the rounding of another batch."""


def declared_end_ids(model: PreTrainedModel) -> set[int]:
    """Tokens at which the model's own `generation_config.json` says that an answer ends."""
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def generation_config(
    sampling: SamplingConfig, tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel
) -> GenerationConfig:
    draws = sampling.temperature > 0
    options = {"temperature": sampling.temperature, "top_p": sampling.top_p} if draws else {}
    ends = sorted(end_token_ids(tokenizer) | declared_end_ids(model))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=draws,
        eos_token_id=ends,
        pad_token_id=pad,
        **options,
    )


def pad_left(prompts: list[list[int]], prefix: int, pad_id: int, device: torch.device) -> dict[str, Tensor]:
    """input_ids and attention_mask, (B, T) int64: the common prefix, then padding, then the rest at the right edge."""
    width = max(map(len, prompts))
    gaps = [width - len(prompt) for prompt in prompts]
    ids = [p[:prefix] + [pad_id] * gap + p[prefix:] for p, gap in zip(prompts, gaps, strict=True)]
    mask = [[1] * prefix + [0] * gap + [1] * (width - prefix - gap) for gap in gaps]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def common_prefix(prompts: list[list[int]]) -> int:
    """Number of leading tokens all prompts share, at least one token of each prompt left out."""
    first, last = min(prompts), max(prompts)
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return min(shared, min(map(len, prompts)) - 1)


def cache_keyword(model: PreTrainedModel) -> str | None:
    """What the model calls the cache it is given, renamed in transformers 5.24; None where it takes none."""
    known = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in known), None)


class Batching(Enum):
    """How prompts are put side by side, the fastest first."""

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
    """Keys and values of those."""

    def inputs(self, prompts: list[list[int]], pad_id: int) -> dict[str, Any]:
        """Arguments of the model's `generate` for a batch."""
        inputs: dict[str, Any] = pad_left(prompts, self.prefix, pad_id, self.model.device)
        if self.cache is not None:
            repeated = copy.deepcopy(self.cache)
            repeated.batch_repeat_interleave(len(prompts))
            inputs[str(cache_keyword(self.model))] = repeated
        return inputs


def can_repeat_prefix(model: PreTrainedModel) -> bool:
    """Whether a cache of this model holds all positions of all layers, and nothing in it counts positions.

    A sliding window, a recurrence or a convolution would see the padding that follows the prefix.
    """
    if cache_keyword(model) is None:
        return False
    layers = DynamicCache(config=model.config).layers
    config = model.config.get_text_config()
    windows = [name for name, value in config.to_dict().items() if "window" in name and type(value) is int and value]
    return not windows and all(type(layer) is DynamicLayer for layer in layers)


@torch.inference_mode()
def choose_batching(model: PreTrainedModel, prompts: list[list[int]], pad_id: int) -> Prompts:
    """The fastest way to batch in which the shortest prompt beside another one gets the logits it gets alone."""
    shortest, longest = min(prompts, key=len), max(prompts, key=len)
    prefix = common_prefix(prompts)
    ways = [Prompts(model, Batching.left_padding), Prompts(model, Batching.equal_length)]
    if prefix and can_repeat_prefix(model):
        cache = DynamicCache(config=model.config)
        ids = torch.tensor([shortest[:prefix]], device=model.device)
        model(input_ids=ids, **{str(cache_keyword(model)): cache})
        ways.insert(0, Prompts(model, Batching.shared_prefix, prefix, cache))
    expected = first_logits(ways[-1], [shortest], pad_id)
    for way in ways:
        other = shortest[::-1] if way.batching is Batching.equal_length else longest
        try:
            logits = first_logits(way, [shortest, other], pad_id)
        except (RuntimeError, ValueError, IndexError) as error:  # from code of the model that never met such a batch
            logger.info("%s cannot run where %s: %s", type(model).__name__, way.batching.value, error)
            continue
        if is_close(logits, expected, model.dtype):
            return way
        logger.info("%s answers otherwise than alone where %s: done slower", type(model).__name__, way.batching.value)
    return Prompts(model, Batching.alone)


def first_logits(way: Prompts, prompts: list[list[int]], pad_id: int) -> Tensor:
    """Logits (CHECKED_TOKENS, V) of the first tokens of the first prompt's greedy answer."""
    config = GenerationConfig(
        max_new_tokens=CHECKED_TOKENS, do_sample=False, pad_token_id=pad_id, eos_token_id=None, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    output = way.model.generate(**way.inputs(prompts, pad_id), generation_config=config)  # type: ignore[operator]
    return torch.stack([logits[0] for logits in output.logits]).float()


def is_close(logits: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether logits are equal but for the rounding of another batch's products.

    Where the first choices part, what follows is of other text, and no longer compared.
    """
    same = (logits.argmax(-1) == expected.argmax(-1)).long().cumprod(0).bool()
    compared = torch.cat([same.new_ones(1), same[:-1]])
    difference = (logits - expected)[compared].abs().amax()
    return bool(difference <= (CLOSE if dtype is torch.float32 else CLOSE_IN_16_BITS) * expected.abs().amax())


def batches(prompts: list[list[int]], way: Batching, batch_size: int) -> Iterator[list[int]]:
    """Indices of the prompts of each batch, by length."""
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
    """The answer to each prompt (token ids), in the order given: the one it gets alone.

    What all prompts begin with - a system prompt, solved examples - runs through the model once where its cache can be
    repeated. How prompts share a batch is tried on two of them first.
    """
    if not prompts:
        return []
    config = generation_config(sampling, tokenizer, model)
    pad_id = config.pad_token_id
    way = choose_batching(model, prompts, pad_id) if len(prompts) > 1 else Prompts(model, Batching.alone)
    answers = [""] * len(prompts)
    torch.manual_seed(sampling.seed)
    with Part("answers", len(prompts)) as part:
        for rows in batches(prompts, way.batching, batch_size):
            inputs = way.inputs([prompts[i] for i in rows], pad_id)
            counted = StoppingCriteriaList([Counted(part, len(rows), sampling.max_new_tokens)])
            output = model.generate(**inputs, generation_config=config, stopping_criteria=counted)  # type: ignore[operator]
            texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for row, text in zip(rows, texts, strict=True):
                answers[row] = text
            counted[0].end()
    return answers


def generate_stream(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: list[int], sampling: SamplingConfig
) -> Iterator[str]:
    """Pieces of the answer to one prompt (token ids) as they come."""
    config = generation_config(sampling, tokenizer, model)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    failure: list[BaseException] = []

    def run() -> None:
        try:
            torch.manual_seed(sampling.seed)
            with torch.inference_mode():
                inputs = pad_left([prompt], 0, config.pad_token_id, model.device)
                model.generate(**inputs, generation_config=config, streamer=streamer)  # type: ignore[operator]
        except BaseException as error:  # handed to the caller's thread below
            failure.append(error)
            streamer.end()

    thread = Thread(target=run, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if failure:
        raise failure[0]
