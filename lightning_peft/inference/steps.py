"""A batch's keys and values, and the model's step from its last tokens to the scores of the next ones.

`PlainSteps` are a model's own forward with a cache that is padded on the left; `static_steps.py` has faster ones.
`AnewSteps` keep nothing, for models whose cache is no such one.
"""

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lightning_peft.adapters.slots import Slots
from lightning_peft.models.forwards import takes

PREFILL_TOKENS = 2048
"""Most positions of prompts, a shared prefix and padding included, that run at once."""


def cache_keyword(model: PreTrainedModel) -> str | None:
    """Return what the model calls the cache it is given, renamed in transformers 5.24; None where it takes none."""
    known = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in known), None)


def can_repeat_prefix(model: PreTrainedModel) -> bool:
    """Return whether a cache of this model holds all positions of all layers, and nothing in it counts positions.

    A sliding window, a recurrence or a convolution would see the padding that follows the prefix, and a forward pass
    that takes no positions would count it.
    """
    return takes_cache_at_positions(model) and layer_kinds(model) == {DynamicLayer} and not has_window(model)


def can_pad_left(model: PreTrainedModel) -> bool:
    """Return whether rows of unlike lengths can share a cache of this model that is padded on the left.

    A sliding window moves with the tokens; it has to be the cache's own, which then holds no more than it.
    """
    kinds = layer_kinds(model)
    if not takes_cache_at_positions(model) or not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return False
    return DynamicSlidingWindowLayer in kinds or not has_window(model)


def takes_cache_at_positions(model: PreTrainedModel) -> bool:
    return cache_keyword(model) is not None and takes(model, "position_ids")


def layer_kinds(model: PreTrainedModel) -> set[type]:
    """Return the kinds of layers that the cache of a model has."""
    return {type(layer) for layer in DynamicCache(config=model.config).layers} or {DynamicLayer}


def has_window(model: PreTrainedModel) -> bool:
    """Return whether the configuration names a window that is on."""
    options = model.config.get_text_config().to_dict()
    names = [name for name in options if "window" in name and name != "max_window_layers"]  # Qwen's says which layers
    return any(type(options[name]) is int and options[name] for name in names)


class Steps(Protocol):
    """The rows of one batch."""

    def __init__(self, model: PreTrainedModel, slots: Slots | None):
        """Begin without rows."""

    def begin(self, prompts: Sequence[list[int]], routes: Sequence[int]) -> Tensor:
        """Run prompts, which become the last rows; return the scores (prompts, V) of their first tokens."""

    def step(self, tokens: Sequence[int], routes: Sequence[int]) -> Tensor:
        """Run a token of each row; return the scores (rows, V) of the next ones."""

    def keep(self, rows: Sequence[int]) -> None:
        """Take all other rows out; row i is then the one that was rows[i], which does not lie before i."""


class PlainSteps:
    """The model's own forward. Padding is on the left, so a row's last position is the batch's."""

    def __init__(self, model: PreTrainedModel, slots: Slots | None):
        self.model, self.slots = model, slots
        self.lengths: list[int] = []
        self.cache: Any = None

    def begin(self, prompts: Sequence[list[int]], routes: Sequence[int]) -> Tensor:
        scores = []
        for prompt, route in zip(prompts, routes, strict=True):
            cache = DynamicCache(config=self.model.config)
            scores.append(self._logits([prompt], [route], cache, {}))
            self.cache = cache if self.cache is None else joined(self.cache, cache)
            self.lengths.append(len(prompt))
        return torch.cat(scores)

    def step(self, tokens: Sequence[int], routes: Sequence[int]) -> Tensor:
        inputs: dict[str, Tensor] = {}
        if len(tokens) > 1:
            device, width = self.model.device, max(self.lengths) + 1
            mask = [[0] * (width - 1 - length) + [1] * (length + 1) for length in self.lengths]
            inputs["attention_mask"] = torch.tensor(mask, device=device)
            inputs["position_ids"] = torch.tensor([[length] for length in self.lengths], device=device)
        self.lengths = [length + 1 for length in self.lengths]
        return self._logits([[token] for token in tokens], routes, self.cache, inputs)

    def keep(self, rows: Sequence[int]) -> None:
        self.lengths = [self.lengths[i] for i in rows]
        if not rows:
            self.cache = None
        elif len(rows) < len(self.cache.layers[0].keys):
            index, width = torch.tensor(rows, device=self.model.device), max(self.lengths)
            for layer in kept_layers(self.cache):
                layer.keys, layer.values = (x[index][:, :, -width:] for x in (layer.keys, layer.values))
                if isinstance(layer, DynamicSlidingWindowLayer):
                    layer.cumulative_length = width

    def _logits(self, ids: list[list[int]], routes: Sequence[int], cache: Any, inputs: dict[str, Tensor]) -> Tensor:
        keyword = {str(cache_keyword(self.model)): cache}
        with routed(self.slots, routes):
            output = self.model(
                input_ids=torch.tensor(ids, device=self.model.device), **inputs, **keyword, use_cache=True
            )
        return output.logits[:, -1]


class AnewSteps:
    """The model's own forward over each row's whole text, a row at a time."""

    def __init__(self, model: PreTrainedModel, slots: Slots | None):
        self.model, self.slots = model, slots
        self.texts: list[list[int]] = []

    def begin(self, prompts: Sequence[list[int]], routes: Sequence[int]) -> Tensor:
        texts = [list(prompt) for prompt in prompts]
        self.texts += texts
        return self._scores(texts, routes)

    def step(self, tokens: Sequence[int], routes: Sequence[int]) -> Tensor:
        for text, token in zip(self.texts, tokens, strict=True):
            text.append(token)
        return self._scores(self.texts, routes)

    def keep(self, rows: Sequence[int]) -> None:
        self.texts = [self.texts[i] for i in rows]

    def _scores(self, texts: Sequence[list[int]], routes: Sequence[int]) -> Tensor:
        scores = []
        for text, route in zip(texts, routes, strict=True):
            ids = torch.tensor([text], device=self.model.device)
            with routed(self.slots, [route]):
                scores.append(self.model(input_ids=ids, use_cache=False).logits[:, -1])
        return torch.cat(scores)


def routed(slots: Slots | None, routes: Sequence[int]) -> AbstractContextManager[None]:
    return slots.routed(routes) if slots is not None else nullcontext()


def joined(first: Any, second: Any) -> Any:
    """Return the caches of two batches as one, the shorter padded on the left."""
    for ours, other in zip(kept_layers(first), kept_layers(second), strict=True):
        width = max(ours.keys.shape[2], other.keys.shape[2])
        if isinstance(ours, DynamicSlidingWindowLayer):
            ours.cumulative_length = max(ours.cumulative_length, other.cumulative_length)
        for name in ("keys", "values"):
            both = getattr(ours, name), getattr(other, name)
            parts = [F.pad(x, (0, 0, width - x.shape[2], 0)) for x in both]
            setattr(ours, name, torch.cat(parts))
    return first


def kept_layers(cache: Any) -> list[Any]:
    """Return the layers of a cache that hold something: some blocks take the keys of another."""
    return [layer for layer in cache.layers if layer.is_initialized]
