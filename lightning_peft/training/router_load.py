"""The evenness with which a mixture's routers use its experts, measured on the device in every forward pass."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_peft.quantization.experts import routed_modules

LOAD, ENTROPY = "router_load", "router_entropy"


class RouterLoad:
    """Counts the rows that every expert of a model is given.

    A module of experts gets the choice of its router as an argument, so the counts are of hooks before it; they stay on
    the device. Nothing is counted in eval mode.
    """

    def __init__(self, model: nn.Module):
        self.rows = slice(None)
        """Rows of the flattened batch that are counted."""
        self.counts: dict[str, Tensor] = {}
        """(experts,) int64 of each module since `start`."""
        self.handles: list[RemovableHandle] = [
            model.get_submodule(name).register_forward_pre_hook(partial(self._count, name, experts), with_kwargs=True)
            for name, experts in routed_modules(model).items()
        ]

    def start(self) -> None:
        """Forget what was counted, a recomputation in the last backward pass included."""
        self.counts = {}

    def stop(self) -> None:
        """Count no more."""
        for handle in self.handles:
            handle.remove()

    @torch.no_grad()
    def _count(
        self, name: str, experts: int, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        if not module.training:
            return
        values = (*inputs, *named.values())
        chosen = next(value for value in values if isinstance(value, Tensor) and not value.is_floating_point())
        chosen = chosen.reshape(-1, chosen.shape[-1])[self.rows].reshape(-1)
        counts = torch.zeros(experts, dtype=torch.int64, device=chosen.device)
        counts.scatter_add_(0, chosen, torch.ones_like(chosen))
        self.counts[name] = self.counts[name] + counts if name in self.counts else counts

    def measured(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return sum and count over the layers, fp32 scalars, of two numbers that are 1 where experts are used evenly.

        router_load: rows of the busiest expert over the mean of all; router_entropy: the entropy of the experts' shares
        over that of equal ones, 0 where one expert has all rows. Padding counts as rows do.
        """
        if not self.counts:
            return {}
        loads, entropies = [], []
        for counts in self.counts.values():
            shares = counts.float() / counts.sum()
            loads.append(shares.max() * len(counts))
            entropies.append(torch.special.entr(shares).sum() / math.log(len(counts)))
        layers = torch.full_like(loads[0], len(loads))  # made on the device, which is not waited for
        return {LOAD: (torch.stack(loads).sum(), layers), ENTROPY: (torch.stack(entropies).sum(), layers)}
