"""Many low-rank adapters on one frozen base, to serve: row i of a batch goes through the adapter in slot `routes[i]`.

Slots have one rank and the dtype the base computes in; an adapter is cast and scaled once, when it is loaded. The
design is S-LoRA's (Sheng et al. 2023, arXiv:2311.03285) with fixed slots in place of pages. On a CPU a row can also be
a guest's, whose factors are read where they lie on the host: there the memory is the same, and slots bound no batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count as counted_from
from itertools import groupby

import torch
from torch import Tensor, nn

from lightning_peft.adapters.base import LowRank
from lightning_peft.kernels import few_rows
from lightning_peft.kernels.frozen_linear import DENSE, Base, base_with_product, given
from lightning_peft.kernels.segments import Segment, add_segments
from lightning_peft.quantization.frozen_base import frozen_base
from lightning_peft.quantization.weights import linear_shape

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""Layer -> scaling * A (rank, in_features) and B^T (rank, out_features), in the dtype of the slots, on the host."""


def cast_factors(change: Mapping[str, LowRank], dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """Return an adapter as the slots hold it: rounded where training rounds it, so that its products are the same."""
    scaled = torch._foreach_mul([part.A for part in change.values()], [part.scaling for part in change.values()])
    factors = [*scaled, *(part.B.t() for part in change.values())]
    # One piece of memory and one call for all: an adapter has hundreds of small tensors.
    pieces = torch.empty(sum(map(Tensor.numel, factors)), dtype=dtype).split([factor.numel() for factor in factors])
    cast = [place.view(factor.shape) for place, factor in zip(pieces, factors, strict=True)]
    torch._foreach_copy_(cast, factors)
    return dict(zip(change, zip(cast[: len(change)], cast[len(change) :], strict=True), strict=True))


def are_finite(factors: Factors) -> bool:
    """Return whether all numbers of an adapter are finite."""
    sizes = torch._foreach_norm([factor for pair in factors.values() for factor in pair], ord=torch.inf)
    return not sizes or bool(torch.stack(sizes).isfinite().all())


class Routing:
    """The owners of a batch's rows: `routes` has the number of a slot or guest for each, -1 for the base."""

    def __init__(self, slots: "Slots", routes: Sequence[int]):
        self.slots, self.routes = slots, tuple(routes)
        self.taken = sorted({route for route in routes if route >= 0})
        self.has_guests = any(route >= slots.count for route in self.taken)
        self.is_finite = all(slots.is_finite(route) for route in self.taken)
        """True where a zero in the mask keeps the adapters of other rows out of a row."""
        self.row_factors: dict[SlotLinear, few_rows.RowFactors] = {}
        self.masks: dict[tuple[tuple[int, int], ...], Tensor] = {}

    def stacked(self, layer: "SlotLinear") -> tuple[Tensor, Tensor, Tensor] | None:
        """Return A (columns, in_features) and B^T (columns, out_features) of all adapters of the batch at a layer.

        The third is (rows, columns): 1 where a column is of a row's own. The result is None where no adapter changes
        the layer.
        """
        slots = self.slots
        if not self.has_guests:
            first, last = self.taken[0], self.taken[-1] + 1
            used = slice(first * slots.rank, last * slots.rank)
            return (
                layer.A[used],
                layer.B_transposed[used],
                self._mask([(route, slots.rank) for route in range(first, last)]),
            )
        found = [(route, pair) for route in self.taken if (pair := slots.pair(route, layer)) is not None]
        if not found:
            return None
        A, B = (torch.cat([pair[side] for _, pair in found]) for side in (0, 1))
        return A, B, self._mask([(route, len(pair[0])) for route, pair in found])

    def _mask(self, columns: list[tuple[int, int]]) -> Tensor:
        """Return (rows, columns) from the route and the number of columns of each adapter."""
        if (key := tuple(columns)) not in self.masks:
            owners, counts = torch.tensor(columns).unbind(1)
            mask = torch.tensor(self.routes)[:, None] == owners.repeat_interleave(counts)
            self.masks[key] = mask.to(next(self.slots.model.parameters()).device, self.slots.dtype)
        return self.masks[key]

    def factors_of_rows(self, layer: "SlotLinear") -> few_rows.RowFactors:
        """Return the factors of each row at a layer."""
        if layer not in self.row_factors:
            found = {route: self.slots.pair(route, layer) for route in set(self.routes)}
            pairs = [found[route] for route in self.routes]
            self.row_factors[layer] = few_rows.RowFactors.of(pairs, self.slots.dtype)
        return self.row_factors[layer]

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """Yield each run of neighbouring rows of one slot or guest: its number, the first row and the one behind."""
        end = 0
        for route, rows in groupby(self.routes):
            start, end = end, end + sum(1 for _ in rows)
            yield route, start, end


class SlotLinear(nn.Module):
    """y = W x + B_s A_s x for the slot s of each row; slots whose layer an adapter leaves alone are zero.

    A is (slots * rank, in_features), B_transposed (slots * rank, out_features).
    """

    A: Tensor
    B_transposed: Tensor

    def __init__(self, base_layer: nn.Module, name: str, slots: "Slots"):
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.slots = slots
        out_features, in_features = linear_shape(base_layer)
        device, rows = next(base_layer.parameters()).device, slots.count * slots.rank
        for side, width in (("A", in_features), ("B_transposed", out_features)):
            self.register_buffer(side, torch.zeros(rows, width, dtype=slots.dtype, device=device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (rows, ..., in_features) to (rows, ..., out_features)."""
        routing = self.slots.routing
        if routing is None:
            return self._base(x)
        if len(routing.routes) != len(x):
            raise RuntimeError(f"a batch of {len(x)} rows needs as many routes, there are {len(routing.routes)}")
        base = frozen_base(self.base_layer, x)
        if x.dtype is self.A.dtype and base is not None and few_rows_of(base, x):
            return few_rows.product(x, base.first, base.tensors[-1], routing.factors_of_rows(self))
        fits = few_rows.fits(x.dtype, x.shape[-1], self.B_transposed.shape[1])
        if x.dtype is self.A.dtype is torch.float32 and fits and few_rows.takes_rows(x):
            return few_rows.add_low_rank(x, routing.factors_of_rows(self), self.base_layer(x))
        if not routing.is_finite:
            return self._by_segments(routing, x)
        if (stacked := routing.stacked(self)) is None:
            return self._base(x)
        # One product serves all adapters, wider than a row's own: few launches, and a panel's width on a CPU.
        A, B, mask = stacked
        inner = x.to(A.dtype) @ A.t()
        inner = (inner * mask.view(len(x), *[1] * (x.ndim - 2), -1)).view(-1, mask.shape[1])
        if base is None:
            output = self.base_layer(x)
            return output + (inner @ B).view(output.shape).to(output.dtype)
        # In 16 bits the change is added in fp32: a young adapter's is below what rounding the base's output loses.
        return base_with_product(x.to(base.dtype), base, inner.to(base.dtype), B.t().to(base.dtype))

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
    """Room for `count` adapters of rank up to `rank` around the linear layers of one frozen model."""

    def __init__(self, model: nn.Module, count: int, rank: int, dtype: torch.dtype):
        self.model, self.count, self.rank, self.dtype = model, count, rank, dtype
        self.layers: dict[str, SlotLinear] = {}
        self.routing: Routing | None = None
        """Routing of the batch that runs."""
        self.last: Routing | None = None
        """Routing of the batch before, which the next batch mostly has too."""
        self.written: list[set[str]] = [set() for _ in range(count)]
        """Layers that each slot's adapter changes."""
        self.finite: dict[int, bool] = {}
        """True for a slot or guest all of whose numbers are finite, as far as that was asked."""
        self.places: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}
        self.guests: dict[int, Factors] = {}
        """Guests by number, which is never that of a slot, nor of another guest."""
        self.numbers = counted_from(count)

    @property
    def takes_guests(self) -> bool:
        """Return whether a row can be a guest's: where the model's memory is the host's."""
        return next(self.model.parameters()).device.type == "cpu"

    def welcome(self, factors: Factors, known_finite: bool = False) -> int:
        """Let an adapter take part without a slot; return its number, to be given up by `dismiss`.

        Raises ValueError for an adapter that fits no layer.
        """
        assert self.takes_guests, "a guest's factors are on the host"
        self._wrap_all(factors)
        self.guests[number := next(self.numbers)] = factors
        if known_finite:
            self.finite[number] = True
        return number

    def dismiss(self, number: int) -> None:
        """Let go of a guest."""
        del self.guests[number]
        self.finite.pop(number, None)

    def pair(self, route: int, layer: SlotLinear) -> tuple[Tensor, Tensor] | None:
        """Return A and B^T of a slot or guest at a layer; None where it leaves the layer alone."""
        if route >= self.count:
            return self.guests[route].get(layer.name)
        return self._places(route)[layer.name] if route >= 0 and layer.name in self.written[route] else None

    @torch.no_grad()
    def load(self, slot: int, factors: Factors, known_finite: bool = False) -> None:
        """Put an adapter into a slot. Raises ValueError for one of a rank above the slots', or that fits no layer.

        A failure in the middle of it leaves a slot that the next adapter may have.
        """
        self._wrap_all(factors)
        rank = max(A.shape[0] for A, _ in factors.values())  # len() of a tensor is slow
        if rank > self.rank:
            raise ValueError(f"an adapter of rank {rank} does not fit slots of rank {self.rank}")
        self.last = None
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
        self.finite.pop(slot, None)
        # One call copies all, as hundreds of small copies cost more by themselves than what they copy.
        torch._foreach_copy_(into, [factor for pair in factors.values() for factor in pair])
        self.written[slot] = set(factors)
        if known_finite:
            self.finite[slot] = True

    def is_finite(self, slot: int) -> bool:
        """Return whether all numbers of a slot, or guest, are finite."""
        if slot not in self.finite:
            self.finite[slot] = are_finite(self.guests[slot] if slot >= self.count else self._places(slot))
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
        layers = {name: self._base_layer(name) for name in factors}
        for name, (A, B) in factors.items():
            shape = linear_shape(layers[name])
            A_shape, B_shape = A.shape, B.shape
            fit = len(A_shape) == len(B_shape) == 2 and A_shape[0] == B_shape[0] and shape == (B_shape[1], A_shape[1])
            if not fit or isinstance(layers[name], nn.Embedding):
                raise ValueError(
                    f"{name}: the adapter's factors, A {tuple(A.shape)} and B transposed {tuple(B.shape)}, do not fit "
                    f"the model's layer of shape {shape}"
                )
        for name in factors.keys() - self.layers.keys():
            self.layers[name] = SlotLinear(layers[name], name, self)
            self.model.set_submodule(name, self.layers[name])

    def _base_layer(self, name: str) -> nn.Module:
        """Return a linear layer of the model by name, wrapped or not yet. Raises ValueError."""
        if name in self.layers:
            return self.layers[name].base_layer
        try:
            layer = self.model.get_submodule(name)
            linear_shape(layer)
        except (AttributeError, TypeError) as error:
            raise ValueError(f"{name}: the model has no linear layer of that name") from error
        return layer

    @contextmanager
    def routed(self, routes: Sequence[int]) -> Iterator[None]:
        """Send row i of a batch through the slot or guest `routes[i]`; -1 is the base."""
        if any(not -1 <= route < self.count and route not in self.guests for route in routes):
            raise ValueError(f"routes {sorted(set(routes))}: there are slots 0 to {self.count - 1}; -1 is the base")
        if self.last is None or self.last.routes != tuple(routes):
            self.last = Routing(self, routes)
        before, self.routing = self.routing, self.last if any(route >= 0 for route in routes) else None
        try:
            yield
        finally:
            self.routing = before
