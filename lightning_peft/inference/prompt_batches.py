"""Prompts side by side in a batch, in the fastest way in which each is answered as it is alone."""

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from lightning_peft.inference.own_settings import only_what_is_asked, own_scores
from lightning_peft.inference.steps import cache_keyword, can_repeat_prefix
from lightning_peft.models.rope import follows_length
from lightning_peft.quantization.weights import computing_dtype

logger = logging.getLogger(__name__)

CHECKED_TOKENS = 4
"""Tokens generated to see whether a prompt in a batch is answered as it is alone."""
CLOSE, CLOSE_IN_16_BITS = 1e-4, 2**-4
"""Largest difference of two logits, as a share of the largest, taken for the rounding of another batch."""
OWN_ERRORS = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)
"""Errors of a model's code for a batch or a cache that it was never run with."""


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
