"""Gradients of the mean loss per token over a whole accumulation window, however the window was cut.

A mean of micro-batch means weighs a short batch like a long one; the sum over tokens divided once by the count of the
window over all ranks does not, and is the same for any split (huggingface/transformers#34191).
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_peft.distributed import reduce_sums
from lightning_peft.optim.sharded import local


class Means(NamedTuple):
    """The means of a window over all ranks, fp64 scalars."""

    loss: Tensor
    """Mean per token, or per pair."""
    weight: Tensor
    """The tokens, each counted by its weight, or pairs that the mean is over."""
    tokens: Tensor
    """Supervised tokens."""
    measured: dict[str, Tensor]
    """Means of what the objective measured beside the loss; nan where there was nothing to measure."""


class TokenWindow:
    """Sums of one window, kept on the device until the optimiser steps."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None
        """(2 x names + 1,) fp64: the loss, then sum and count of all that is measured."""
        self.names: list[str] = []
        self.weight = 0.0
        self.tokens = 0.0

    def add(
        self,
        loss: Tensor,
        weight: float,
        tokens: float | None = None,
        measured: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """Add a micro batch.

        loss: its sum, fp32 scalar; weight: what it is divided by; tokens: the supervised ones, where that is something
        else; measured: sum and count of each name, the same names in each batch.
        """
        measured = measured or {}
        parts = [loss, *(part for name in measured for part in measured[name])]
        sums = torch.stack([part.detach().double() for part in parts])
        assert self.sums is None or self.names == list(measured), "every batch of a window measures the same"
        self.names = list(measured)
        self.sums = sums if self.sums is None else self.sums + sums
        self.weight += weight
        self.tokens += weight if tokens is None else tokens

    def close(self) -> Means:
        """Return the means over all ranks; the next window starts empty."""
        assert self.sums is not None, "close() follows at least one add()"
        counts = [torch.full_like(self.sums[:1], count) for count in (self.weight, self.tokens)]
        weight, tokens, loss, *parts = reduce_sums(torch.cat([*counts, self.sums]))
        measured = {name: parts[2 * i] / parts[2 * i + 1] for i, name in enumerate(self.names)}
        self.sums, self.weight, self.tokens = None, 0.0, 0.0
        return Means(loss / divisor(weight), weight, tokens, measured)


def divisor(weight: Tensor) -> Tensor:
    """Return what sums are divided by: the number of tokens or pairs, or 1 where there are none."""
    return torch.where(weight > 0, weight, 1.0)


def scale_gradients(parameters: Iterable[nn.Parameter], factor: Tensor) -> None:
    """Multiply every gradient by one scalar tensor, in place, without asking the device for its value."""
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    if gradients:
        factors = factor.to(gradients[0].device, torch.float32)
        torch._foreach_mul_(gradients, factors)
