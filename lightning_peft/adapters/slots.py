"""Many low-rank adapters on one frozen base, to serve: row i of a batch goes through the adapter in slot `routes[i]`.

Slots have the dtype the base computes in; an adapter is cast and scaled once, when it is read. On a GPU the design is
S-LoRA's (Sheng et al. 2023, arXiv:2311.03285) with fixed slots of one rank in place of pages. On a CPU a slot refers to
factors that are read where they lie: the memory is the same, so nothing is copied, and no number bounds a batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors as unflatten_dense_tensors

from lightning_peft.adapters.base import LowRank
from lightning_peft.kernels import few_rows
from lightning_peft.kernels.frozen_linear import DENSE, Base, base_with_product, given
from lightning_peft.kernels.products import add_product_
from lightning_peft.kernels.segments import Segment, add_segments
from lightning_peft.quantization.frozen_base import frozen_base
from lightning_peft.quantization.weights import linear_shape

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""Layer -> scaling * A (rank, in_features) and B^T (rank, out_features), in the dtype of the slots, on the host."""


class CastFactors(dict[str, tuple[Tensor, Tensor]]):
    """An adapter as the slots hold it; slots on the host check one once, however often it is loaded."""

    checked_by: "Slots | None" = None
    table: "few_rows.FactorTable | None" = None
    """Its addresses by the layers of those slots."""


def cast_factors(change: Mapping[str, LowRank], dtype: torch.dtype) -> CastFactors:
    """Return an adapter as the slots hold it: rounded where training rounds it, so that its products are the same."""
    A, B = [part.A for part in change.values()], [part.B.t() for part in change.values()]
    scalings = [part.scaling for part in change.values()]
    # One piece of memory and few calls for all: an adapter has hundreds of small tensors.
    flat = torch.empty(sum(map(Tensor.numel, A + B)), dtype=dtype)
    cast = unflatten_dense_tensors(flat, A + B)
    if few_rows.takes_cast([*A, *(part.B for part in change.values())], dtype):
        few_rows.cast(A, scalings, False, flat)
        few_rows.cast(B, [1.0] * len(B), True, flat[sum(map(Tensor.numel, A)) :])
    else:
        torch._foreach_copy_(cast, [*torch._foreach_mul(A, scalings), *B])
    return CastFactors(zip(change, zip(cast[: len(change)], cast[len(change) :], strict=True), strict=True))


def are_finite(factors: Factors) -> bool:
    """Return whether all numbers of an adapter are finite."""
    sizes = torch._foreach_norm([factor for pair in factors.values() for factor in pair], ord=torch.inf)
    return not sizes or bool(torch.stack(sizes).isfinite().all())


class Routing:
    """The owners of a batch's rows: `routes` has the number of a slot for each, -1 for the base."""

    def __init__(self, slots: "Slots", routes: Sequence[int]):
        self.slots, self.routes = slots, tuple(routes)
        self.taken = sorted({route for route in routes if route >= 0})
        self.is_finite = all(slots.is_finite(route) for route in self.taken)
        """True where a zero in the mask keeps the adapters of other rows out of a row."""
        self.row_factors: list[few_rows.RowFactors] = []
        self.stacks: dict[SlotLinear, StackedFactors | None] = {}
        """Stacks of factors on the host, which are copies."""
        self.masks: dict[tuple[tuple[int, int], ...], Tensor] = {}

    def stacked(self, layer: "SlotLinear") -> "StackedFactors | None":
        """Return the factors of all adapters of the batch at a layer; None where no adapter changes it."""
        slots = self.slots
        if not slots.on_host:
            first, last = self.taken[0], self.taken[-1] + 1
            used = slice(first * slots.rank, last * slots.rank)
            mask = self._mask([(route, slots.rank) for route in range(first, last)])
            return StackedFactors(layer.A[used], layer.B_transposed[used], mask)
        if layer not in self.stacks:
            found = [(route, pair) for route in self.taken if (pair := slots.pair(route, layer)) is not None]
            self.stacks[layer] = None
            if found:
                A, B = (torch.cat([pair[side] for _, pair in found]) for side in (0, 1))
                mask = self._mask([(route, len(pair[0])) for route, pair in found])
                self.stacks[layer] = StackedFactors(A, B, mask)
        return self.stacks[layer]

    def _mask(self, columns: list[tuple[int, int]]) -> Tensor:
        """Return (rows, columns) from the route and the number of columns of each adapter."""
        if (key := tuple(columns)) not in self.masks:
            owners, counts = torch.tensor(columns).unbind(1)
            mask = torch.tensor(self.routes)[:, None] == owners.repeat_interleave(counts)
            self.masks[key] = mask.to(next(self.slots.model.parameters()).device, self.slots.dtype)
        return self.masks[key]

    def factors_of_rows(self, layer: "SlotLinear") -> few_rows.RowFactors:
        """Return the factors of each row at a layer, on the host."""
        if len(self.row_factors) <= layer.number:
            slots = self.slots
            tables = [slots.tables.get(route) for route in self.routes]
            self.row_factors = few_rows.RowFactors.of_layers(tables, len(slots.layers), slots.dtype)
        return self.row_factors[layer.number]

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """Yield each run of neighbouring rows of one slot: its number, the first row and the one behind."""
        end = 0
        for route, rows in groupby(self.routes):
            start, end = end, end + sum(1 for _ in rows)
            yield route, start, end


class StackedFactors(NamedTuple):
    """The factors of several adapters below each other, and whose row takes part in which of them."""

    A: Tensor
    """(columns, in_features)."""
    B_transposed: Tensor
    """(columns, out_features)."""
    mask: Tensor
    """(rows, columns), 1 where a column is of a row's own adapter."""


class SlotLinear(nn.Module):
    """y = W x + B_s A_s x for the slot s of each row; slots whose layer an adapter leaves alone are zero.

    On a GPU A is (slots * rank, in_features), B_transposed (slots * rank, out_features).
    """

    A: Tensor
    B_transposed: Tensor

    def __init__(self, base_layer: nn.Module, name: str, number: int, slots: "Slots"):
        super().__init__()
        self.base_layer = base_layer
        self.name, self.number = name, number
        self.slots = slots
        self.shape = self.out_features, in_features = linear_shape(base_layer)
        if slots.on_host:
            return
        device, rows = next(base_layer.parameters()).device, slots.count * slots.rank
        for side, width in (("A", in_features), ("B_transposed", self.out_features)):
            self.register_buffer(side, torch.zeros(rows, width, dtype=slots.dtype, device=device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (rows, ..., in_features) to (rows, ..., out_features)."""
        routing = self.slots.routing
        if routing is None:
            return self._base(x)
        if len(routing.routes) != len(x):
            raise RuntimeError(f"a batch of {len(x)} rows needs as many routes, there are {len(routing.routes)}")
        base = frozen_base(self.base_layer, x)
        if self.slots.on_host and (output := self._by_kernels(routing, x, base)) is not None:
            return output
        if not routing.is_finite:
            return self._by_segments(routing, x)
        if (stack := routing.stacked(self)) is None:
            return self._base(x)
        # One product serves all adapters, wider than a row's own: few launches, and a panel's width on a CPU.
        A, B, mask = stack
        inner = x.to(A.dtype) @ A.t()
        inner = (inner * mask.view(len(x), *[1] * (x.ndim - 2), -1)).view(-1, mask.shape[1])
        if base is None:
            output = self.base_layer(x)
            return output + (inner @ B).view(output.shape).to(output.dtype)
        # In 16 bits the change is added in fp32: a young adapter's is below what rounding the base's output loses.
        return base_with_product(x.to(base.dtype), base, inner.to(base.dtype), B.t().to(base.dtype))

    def _by_kernels(self, routing: Routing, x: Tensor, base: Base | None) -> Tensor | None:
        """Return the output where a kernel reads each row's factors as they lie; None where there is none."""
        if x.dtype is not self.slots.dtype:
            return None
        factors = routing.factors_of_rows(self)
        if base is not None and few_rows_of(base, x):
            return few_rows.product(x, base.first, base.tensors[-1], factors)
        fits = few_rows.fits(x.dtype, x.shape[-1], self.out_features)
        if x.dtype is torch.float32 and fits and few_rows.takes_rows(x):
            return few_rows.add_low_rank(x, factors, self.base_layer(x))
        if base is None or base.form != DENSE or not factors.most or not few_rows.takes_changes(x):
            return None
        # In 16 bits the change comes first: the product's sums in fp32 are added to it, as it may be a young adapter's.
        output = few_rows.changes(x, factors, self.out_features)
        rows = x.reshape(-1, x.shape[-1])
        add_product_(rows, base.first, base.tensors[-1], output.view(-1, self.out_features))
        return output

    def _base(self, x: Tensor) -> Tensor:
        """Return the output of the layer without an adapter."""
        base = frozen_base(self.base_layer, x) if few_rows.takes_rows(x) else None
        if base is not None and few_rows_of(base, x):
            return few_rows.product(x, base.first, base.tensors[-1])
        return self.base_layer(x)

    def _by_segments(self, routing: Routing, x: Tensor) -> Tensor:
        """Take the base's product of all rows, and each adapter's of its own."""
        each = x[0].numel() // x.shape[-1]
        segments, factors = [], []
        for route, start, stop in routing.runs():
            if (pair := self.slots.pair(route, self)) is not None:
                segments.append(Segment(start * each, stop * each, 1.0))
                factors.append((pair[0], pair[1].t()))
        if not segments:
            return self.base_layer(x)
        return add_segments(frozen_base(self.base_layer, x) or given(self.base_layer(x)), x, segments, factors)


def few_rows_of(base: Base, x: Tensor) -> bool:
    """Return whether the kernel of few rows computes a layer's product."""
    return base.form == DENSE and few_rows.takes(x, base.first, base.tensors[-1])


class Slots:
    """Room for adapters of rank up to `rank` around the linear layers of one frozen model.

    There are `count` slots. `on_host`, which is so for a model on a CPU unless it is said otherwise, an adapter is read
    where it lies, and any other number is a slot while an adapter is in it.
    """

    def __init__(self, model: nn.Module, count: int, rank: int, dtype: torch.dtype, on_host: bool | None = None):
        self.model, self.count, self.rank, self.dtype = model, count, rank, dtype
        self.on_host = next(model.parameters()).device.type == "cpu" if on_host is None else on_host
        self.layers: dict[str, SlotLinear] = {}
        self.changes = 0
        """Count of the times that layers of the model were wrapped or given back."""
        self.routing: Routing | None = None
        """Routing of the batch that runs."""
        self.last: Routing | None = None
        """Routing of the batch before, which the next batch mostly has too."""
        self.finite: dict[int, bool] = {}
        """True for a slot all of whose numbers are finite, as far as that was asked."""
        self.held: dict[int, Factors] = {}
        """Adapters that are read where they lie, by slot."""
        self.tables: dict[int, few_rows.FactorTable] = {}
        """Addresses of their factors, by slot."""
        self.written: list[set[str]] = [set() for _ in range(count)]
        """Layers that each slot's adapter changes, where adapters are copied."""
        self.places: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}

    def pair(self, route: int, layer: SlotLinear) -> tuple[Tensor, Tensor] | None:
        """Return A and B^T of a slot at a layer; None where it leaves the layer alone."""
        if self.on_host:
            return self.held.get(route, {}).get(layer.name)
        return self._places(route)[layer.name] if route >= 0 and layer.name in self.written[route] else None

    def load(self, slot: int, factors: Factors, known_finite: bool = False) -> None:
        """Put an adapter into a slot. Raises ValueError for one of a rank above the slots', or that fits no layer.

        A failure in the middle of it leaves a slot that the next adapter may have.
        """
        table = factors.table if isinstance(factors, CastFactors) and factors.checked_by is self else None
        if table is None:
            self._wrap_all(factors)
            rank = max(A.shape[0] for A, _ in factors.values())  # len() of a tensor is slow
            if rank > self.rank:
                raise ValueError(f"an adapter of rank {rank} does not fit slots of rank {self.rank}")
        self.last = None
        self.finite.pop(slot, None)
        if self.on_host:
            if table is None:
                table = few_rows.FactorTable.of([factors.get(name) for name in self.layers], self.dtype)
                if isinstance(factors, CastFactors):
                    factors.checked_by, factors.table = self, table
            self.held[slot], self.tables[slot] = factors, table
        else:
            self._copy(slot, factors)
        if known_finite:
            self.finite[slot] = True

    def unload(self, slot: int) -> None:
        """Let go of an adapter that is read where it lies."""
        assert self.on_host, "an adapter that was copied stays until the next one comes"
        self.last = None
        for of_slots in (self.held, self.tables, self.finite):
            of_slots.pop(slot, None)

    def take_back(self, slot: int, known: int) -> None:
        """Leave a slot empty, and all but the first `known` layers as the model had them: no other slot changes these.

        Some models compute with their layers by themselves, and would no longer run without an adapter either.
        """
        if self.on_host:
            if isinstance(factors := self.held.get(slot), CastFactors):
                factors.checked_by = factors.table = None
            self.unload(slot)
        new = [*self.layers][known:]
        self.changes += 1
        for name in new:
            self.model.set_submodule(name, self.layers.pop(name).base_layer)
        self.last = None
        self.places.clear()
        for written in self.written:
            written.difference_update(new)

    @torch.no_grad()
    def _copy(self, slot: int, factors: Factors) -> None:
        places = self._places(slot)
        for name in self.written[slot] - factors.keys():
            for place in places[name]:
                place.zero_()
        into: list[Tensor] = []
        for name, pair in factors.items():
            for place, factor in zip(places[name], pair, strict=True):
                if (rank := factor.shape[0]) < self.rank:
                    place[rank:].zero_()
                    place = place[:rank]
                into.append(place)
        self.written[slot] |= factors.keys()  # also after half a copy
        # One call copies all, as hundreds of small copies cost more by themselves than what they copy.
        torch._foreach_copy_(into, [factor for pair in factors.values() for factor in pair])
        self.written[slot] = set(factors)

    def is_finite(self, slot: int) -> bool:
        """Return whether all numbers of a slot are finite."""
        if slot not in self.finite:
            self.finite[slot] = are_finite(self.held.get(slot, {}) if self.on_host else self._places(slot))
        return self.finite[slot]

    def _places(self, slot: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the rows of each layer's matrices that are a slot's."""
        places = self.places.setdefault(slot, {})
        rows = slice(slot * self.rank, (slot + 1) * self.rank)
        if len(places) < len(self.layers):  # called for each layer of each step
            for name in self.layers.keys() - places.keys():
                places[name] = self.layers[name].A[rows], self.layers[name].B_transposed[rows]
        return places

    def _wrap_all(self, factors: Factors) -> None:
        """Wrap the layers of an adapter. Raises ValueError, before any is wrapped, for an adapter that does not fit."""
        layers = {name: self._base_layer(name) for name in factors if name not in self.layers}
        shapes = {name: linear_shape(layer) for name, layer in layers.items()}
        for name, (A, B) in factors.items():
            shape = shapes[name] if name in shapes else self.layers[name].shape
            A_shape, B_shape = A.shape, B.shape
            fit = len(A_shape) == len(B_shape) == 2 and A_shape[0] == B_shape[0] and shape == (B_shape[1], A_shape[1])
            if not fit or isinstance(layers.get(name), nn.Embedding):
                raise ValueError(
                    f"{name}: the adapter's factors, A {tuple(A.shape)} and B transposed {tuple(B.shape)}, do not fit "
                    f"the model's layer of shape {shape}"
                )
        self.changes += bool(layers)
        for name, layer in layers.items():
            self.layers[name] = SlotLinear(layer, name, len(self.layers), self)
            self.model.set_submodule(name, self.layers[name])

    def _base_layer(self, name: str) -> nn.Module:
        """Return a linear layer of the model by name. Raises ValueError."""
        try:
            layer = self.model.get_submodule(name)
            linear_shape(layer)
        except (AttributeError, TypeError) as error:
            raise ValueError(f"{name}: the model has no linear layer of that name") from error
        return layer

    @contextmanager
    def routed(self, routes: Sequence[int]) -> Iterator[None]:
        """Send row i of a batch through slot `routes[i]`; -1 is the base."""
        if any(not -1 <= route < self.count and route not in self.held for route in routes):
            raise ValueError(f"routes {sorted(set(routes))}: there are slots 0 to {self.count - 1}; -1 is the base")
        if self.last is None or self.last.routes != tuple(routes):
            self.last = Routing(self, routes)
        before, self.routing = self.routing, self.last if any(route >= 0 for route in routes) else None
        try:
            yield
        finally:
            self.routing = before
