"""Many low-rank adapters on one frozen base, to serve: row i of a batch goes through the adapter in slot `routes[i]`.

Slots have one rank and the dtype the base computes in; an adapter is cast and scaled once, when it is loaded. The
design is S-LoRA's (Sheng et al. 2023, arXiv:2311.03285) with fixed slots in place of pages.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_peft.adapters.base import LowRank
from lightning_peft.kernels.frozen_linear import base_with_product
from lightning_peft.quantization.frozen_base import frozen_base
from lightning_peft.quantization.weights import linear_shape

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""Layer -> scaling * A (rank, in_features) and B^T (rank, out_features), in the dtype of the slots, on the host."""


def cast_factors(change: Mapping[str, LowRank], dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """Return an adapter as the slots hold it: rounded where training rounds it, so that its products are the same."""
    return {
        name: ((part.scaling * part.A).to(dtype).contiguous(), part.B.t().to(dtype).contiguous())
        for name, part in change.items()
    }


class SlotLinear(nn.Module):
    """y = W x + B_s A_s x for the slot s of each row; slots whose layer an adapter leaves alone are zero.

    A is (slots * rank, in_features), B_transposed (slots * rank, out_features).
    """

    A: Tensor
    B_transposed: Tensor

    def __init__(self, base_layer: nn.Module, slots: "Slots"):
        super().__init__()
        self.base_layer = base_layer
        self.slots = slots
        out_features, in_features = linear_shape(base_layer)
        device, rows = next(base_layer.parameters()).device, slots.count * slots.rank
        for name, width in (("A", in_features), ("B_transposed", out_features)):
            self.register_buffer(name, torch.zeros(rows, width, dtype=slots.dtype, device=device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (rows, ..., in_features) to (rows, ..., out_features)."""
        mask, used = self.slots.mask, self.slots.used
        if mask is None:
            return self.base_layer(x)
        if len(mask) != len(x):
            raise RuntimeError(f"a batch of {len(x)} rows needs as many routes, there are {len(mask)}")
        inner = x.to(self.A.dtype) @ self.A[used].t()
        inner = (inner * mask.view(len(x), *[1] * (x.ndim - 2), -1)).view(-1, mask.shape[1])
        base = frozen_base(self.base_layer, x)
        if base is None:
            output = self.base_layer(x)
            return output + (inner @ self.B_transposed[used]).view(output.shape).to(output.dtype)
        # In 16 bits the change is added in fp32: a young adapter's is below what rounding the base's output loses.
        return base_with_product(x.to(base.dtype), base, inner.to(base.dtype), self.B_transposed[used].t())


class Slots:
    """Room for `count` adapters of rank up to `rank` around the linear layers of one frozen model."""

    def __init__(self, model: nn.Module, count: int, rank: int, dtype: torch.dtype):
        self.model, self.count, self.rank, self.dtype = model, count, rank, dtype
        self.layers: dict[str, SlotLinear] = {}
        self.mask: Tensor | None = None
        """(rows, columns in use): 1 where a row's slot is."""
        self.used = slice(0, 0)
        self.written: list[set[str]] = [set() for _ in range(count)]
        """Layers that each slot's adapter changes."""
        self.places: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}

    @torch.no_grad()
    def load(self, slot: int, factors: Factors) -> None:
        """Put an adapter into a slot. Raises ValueError where its rank is above the slots', or it fits no layer."""
        rank = max(len(A) for A, _ in factors.values())
        if rank > self.rank:
            raise ValueError(f"an adapter of rank {rank} does not fit slots of rank {self.rank}")
        for name in factors.keys() - self.layers.keys():
            self._wrap(name, factors[name])
        places = self._places(slot)
        for name in self.written[slot] - factors.keys():
            for place in places[name]:
                place.zero_()
        into: list[Tensor] = []
        for name, pair in factors.items():
            for place, factor in zip(places[name], pair, strict=True):
                if len(factor) < self.rank:
                    place[len(factor) :].zero_()
                    place = place[: len(factor)]
                into.append(place)
        # One call: hundreds of small copies cost more by themselves than what they copy.
        torch._foreach_copy_(into, [factor for pair in factors.values() for factor in pair])
        self.written[slot] = set(factors)

    def _places(self, slot: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the rows of each layer's matrices that are a slot's."""
        places = self.places.setdefault(slot, {})
        rows = slice(slot * self.rank, (slot + 1) * self.rank)
        for name in self.layers.keys() - places.keys():
            places[name] = self.layers[name].A[rows], self.layers[name].B_transposed[rows]
        return places

    def _wrap(self, name: str, factors: tuple[Tensor, Tensor]) -> None:
        try:
            base_layer = self.model.get_submodule(name)
            shape = linear_shape(base_layer)
        except (AttributeError, TypeError) as error:
            raise ValueError(f"{name}: the model has no linear layer of that name") from error
        if isinstance(base_layer, nn.Embedding) or shape != (factors[1].shape[1], factors[0].shape[1]):
            raise ValueError(f"{name}: the adapter's factors do not fit the model's layer of shape {shape}")
        self.layers[name] = SlotLinear(base_layer, self)
        self.model.set_submodule(name, self.layers[name])

    @contextmanager
    def routed(self, routes: Sequence[int]) -> Iterator[None]:
        """Inside, row i of a batch goes through slot `routes[i]`; -1 is the base."""
        if any(not -1 <= route < self.count for route in routes):
            raise ValueError(f"routes {sorted(set(routes))}: there are slots 0 to {self.count - 1}; -1 is the base")
        active = sorted({route for route in routes if route >= 0})
        before = self.mask, self.used
        if active:
            first, last = active[0], active[-1] + 1
            self.used = slice(first * self.rank, last * self.rank)
            device = next(self.model.parameters()).device
            slot_of_column = torch.arange(first, last, device=device).repeat_interleave(self.rank)
            self.mask = (torch.tensor(routes, device=device)[:, None] == slot_of_column).to(self.dtype)
        else:
            self.mask = None
        try:
            yield
        finally:
            self.mask, self.used = before
