"""Answers to requests that come and go: each step gives every running one a token, and a slot of adapters each row."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lightning_peft.adapters.slots import Slots
from lightning_peft.inference.generate import cache_keyword, can_repeat_prefix
from lightning_peft.inference.sampling import SamplingConfig


@dataclass
class Choice:
    """One generated token."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    """The likeliest tokens and their logarithms of probability, as many as were asked for."""


@dataclass
class Row:
    """One answer being written."""

    prompt: list[int]
    sampling: SamplingConfig
    on_token: Callable[[Choice], bool]
    """Takes a token; returns whether the answer goes on."""
    slot: int = -1
    """Adapter slot; -1 is the base."""
    top_logprobs: int = 0
    tokens: list[int] = field(default_factory=list)
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        self.generator.manual_seed(self.sampling.seed)

    @property
    def length(self) -> int:
        """Return the positions in the cache."""
        return len(self.prompt) + len(self.tokens) - 1


class Decoder:
    """The rows of one batch, with their keys and values padded on the left. Used by one thread.

    A model whose cache is more than keys and values of all positions gets one row at a time.
    """

    def __init__(self, model: PreTrainedModel, slots: Slots | None):
        self.model, self.slots = model, slots
        self.can_batch = can_repeat_prefix(model)
        self.rows: list[Row] = []
        self.cache: Any = None

    @torch.inference_mode()
    def add(self, row: Row) -> None:
        """Run a row's prompt and give it its first token; it takes part in the next step where it goes on."""
        cache = DynamicCache(config=self.model.config)
        ids = torch.tensor([row.prompt], device=self.model.device)
        logits = self._logits([row], {"input_ids": ids}, cache)
        if self._choose(row, logits[0]):
            self.cache = cache if self.cache is None else joined(self.cache, cache)
            self.rows.append(row)

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """Give every row its next token; return those that ended."""
        device = self.model.device
        lengths = [row.length for row in self.rows]
        width = max(lengths) + 1
        inputs: dict[str, Tensor] = {"input_ids": torch.tensor([[row.tokens[-1]] for row in self.rows], device=device)}
        if len(self.rows) > 1:
            gaps = [width - 1 - length for length in lengths]
            mask = [[0] * gap + [1] * (width - gap) for gap in gaps]
            inputs["attention_mask"] = torch.tensor(mask, device=device)
            inputs["position_ids"] = torch.tensor([[length] for length in lengths], device=device)
        logits = self._logits(self.rows, inputs, self.cache)
        goes_on = [self._choose(row, scores) for row, scores in zip(self.rows, logits, strict=True)]
        ended = [row for row, on in zip(self.rows, goes_on, strict=True) if not on]
        if ended:
            self._keep([i for i, on in enumerate(goes_on) if on])
        return ended

    def drop(self, rows: list[Row]) -> None:
        """Take rows out that nobody waits for any more."""
        self._keep([i for i, row in enumerate(self.rows) if not any(row is other for other in rows)])

    @torch.inference_mode()
    def _keep(self, kept: list[int]) -> None:
        self.rows = [self.rows[i] for i in kept]
        if not self.rows:
            self.cache = None
            return
        if not self.can_batch:
            return
        width = max(row.length for row in self.rows)
        index = torch.tensor(kept, device=self.model.device)
        for layer in self.cache.layers:
            layer.keys, layer.values = (x[index][:, :, -width:] for x in (layer.keys, layer.values))

    def _logits(self, rows: list[Row], inputs: dict[str, Tensor], cache: Any) -> Tensor:
        """Return the scores (rows, V) of the next tokens, fp32 on the host."""
        keyword = {str(cache_keyword(self.model)): cache}
        routed = self.slots.routed([row.slot for row in rows]) if self.slots is not None else nullcontext()
        with routed:
            output = self.model(**inputs, **keyword, use_cache=True)
        return output.logits[:, -1].float().cpu()

    def _choose(self, row: Row, scores: Tensor) -> bool:
        logprobs = scores.log_softmax(-1)
        token = draw(scores, row.sampling, row.generator)
        top = logprobs.topk(row.top_logprobs) if row.top_logprobs else None
        best = [] if top is None else list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        row.tokens.append(token)
        goes_on = row.on_token(Choice(token, float(logprobs[token]), best))
        return goes_on and len(row.tokens) < row.sampling.max_new_tokens


def draw(scores: Tensor, sampling: SamplingConfig, generator: torch.Generator) -> int:
    """Return the next token from its scores (V,): the best, or one drawn from the smallest set of `top_p`."""
    if sampling.temperature == 0:
        return int(scores.argmax())
    shares, order = (scores / sampling.temperature).softmax(-1).sort(descending=True)
    before = shares.cumsum(-1) - shares
    shares = torch.where(before < sampling.top_p, shares, 0.0)
    return int(order[torch.multinomial(shares, 1, generator=generator)])


def joined(first: Any, second: Any) -> Any:
    """Return the caches of two batches as one, the shorter padded on the left."""
    for ours, other in zip(first.layers, second.layers, strict=True):
        width = max(ours.keys.shape[2], other.keys.shape[2])
        for name in ("keys", "values"):
            both = getattr(ours, name), getattr(other, name)
            parts = [F.pad(x, (0, 0, width - x.shape[2], 0)) for x in both]
            setattr(ours, name, torch.cat(parts))
    return first
