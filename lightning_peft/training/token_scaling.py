"""Gradients of the mean loss per token over a whole accumulation window, however the window was cut.

A mean of micro-batch means weighs a short batch like a long one; the sum over tokens divided once by the count of the
window over all ranks does not, and is the same for any split (huggingface/transformers#34191).
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightning_peft.distributed import reduce_sums
from lightning_peft.optim.sharded import local


class TokenWindow:
    """Sums of one window: the loss, kept on the device until the optimiser steps, and the supervised tokens."""

    def __init__(self) -> None:
        self.loss: Tensor | None = None
        self.tokens = 0.0

    def add(self, loss: Tensor, tokens: float) -> None:
        """loss: summed over its tokens, fp32 scalar; tokens: how many, each counted by its weight."""
        loss = loss.detach().double()
        self.loss = loss if self.loss is None else self.loss + loss
        self.tokens += tokens

    def close(self) -> tuple[Tensor, Tensor]:
        """(mean loss per token, tokens) of the window over all ranks, fp64 scalars; the next window starts empty."""
        assert self.loss is not None, "close() follows at least one add()"
        loss, tokens = reduce_sums(torch.stack([self.loss, torch.full_like(self.loss, self.tokens)]))
        self.loss, self.tokens = None, 0.0
        return loss / divisor(tokens), tokens


def divisor(tokens: Tensor) -> Tensor:
    """What sums over tokens are divided by: their number, or 1 where there are none."""
    return torch.where(tokens > 0, tokens, 1.0)


def scale_gradients(parameters: Iterable[nn.Parameter], factor: Tensor) -> None:
    """Multiply every gradient by one scalar tensor, in place, without asking the device for its value."""
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    if gradients:
        factors = factor.to(gradients[0].device, torch.float32)
        torch._foreach_mul_(gradients, factors)
