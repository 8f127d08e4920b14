"""Several adapters of any method on one frozen base, to train: each row of a batch goes through its own.

A bank is made of segments whose rows may stand in any order. The base's product is taken once for all rows whose change
is a low-rank product. Other methods have another product of the base, and take it on their rows alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import torch
from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter, AdapterConfig
from lightning_peft.adapters.inject import adapters, inject_adapters
from lightning_peft.adapters.segments import change_of_base
from lightning_peft.kernels.frozen_linear import given
from lightning_peft.kernels.low_rank import random_state
from lightning_peft.kernels.segments import RandomState, Segment, add_segments
from lightning_peft.quantization.frozen_base import frozen_base


class AdapterBank(nn.Module):
    """A base layer and the adapters around it, of any methods and ranks; an absent one (None) leaves the base alone.

    Row i of the input, its dimension 0, goes through adapter `routes[i]`; -1 is the base. ValueError for adapters
    around different layers, or one that changes what the base is fed, which the others would see.
    """

    def __init__(self, members: Sequence[Adapter | None]):
        super().__init__()
        present = [member for member in members if member is not None]
        self.base_layer = present[0].base_layer
        for member in present:
            if type(member).base_input is not Adapter.base_input:
                raise ValueError(f"{type(member).__name__} rescales the base's input: it cannot share a base layer")
            if member.base_layer is not self.base_layer:
                raise ValueError("the adapters of a bank are around one base layer; these are around several")
        self.members = nn.ModuleDict({str(i): member for i, member in enumerate(members) if member is not None})
        self.routes: Sequence[int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map (rows, ..., in_features) to (rows, ..., out_features)."""
        if self.routes is None or len(self.routes) != len(x):
            raise RuntimeError(f"a batch of {len(x)} rows needs as many routes: call the model inside `routed`")
        routes = self.routes
        # Adapters that share the base's product come first, each adapter's rows side by side.
        order = sorted(range(len(x)), key=lambda row: (self._own_product(routes[row]), routes[row]))
        places = torch.tensor(order, device=x.device)
        is_sorted = order == list(range(len(x)))
        rows = x if is_sorted else x.index_select(0, places)
        runs, end = [], 0
        for route, found in groupby(routes[row] for row in order):
            start, end = end, end + sum(1 for _ in found)
            runs.append((route, start, end))
        shared = [run for run in runs if not self._own_product(run[0])]
        outputs = [self._shared_product(rows[: shared[-1][2]], shared)] if shared else []
        outputs += [self.members[str(route)](rows[start:end]) for route, start, end in runs[len(shared) :]]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return output if is_sorted else output.index_select(0, places.argsort())

    def _own_product(self, route: int) -> bool:
        """Return whether an adapter's output is more than the base's and a low-rank product."""
        return str(route) in self.members and not self._member(route).is_product()

    def _member(self, route: int) -> Adapter:
        member = self.members[str(route)]
        assert isinstance(member, Adapter)
        return member

    def _shared_product(self, x: Tensor, runs: Sequence[tuple[int, int, int]]) -> Tensor:
        """Return the output of rows x, given runs of them as adapter, first row and the one behind."""
        each = x[0].numel() // x.shape[-1]
        generator = random_state(x.device)
        # Inputs are dropped in the order of the adapters, by the random numbers that are next here.
        random = RandomState(generator.get_state())
        segments, factors = [], []
        for route, start, stop in runs:
            if str(route) not in self.members or not self._member(route).enabled:
                continue
            member = self._member(route)
            product = member.product()
            assert product is not None, "is_product says that there is one"
            segments.append(Segment(start * each, stop * each, member.scaling, member.active_dropout, random))
            factors.append(product)
        if not segments:
            return self.base_layer(x)
        output = add_segments(frozen_base(self.base_layer, x) or given(self.base_layer(x)), x, segments, factors)
        generator.set_state(random.state)
        return output


def inject_bank(
    model: nn.Module, configs: Sequence[AdapterConfig], fill: Callable[[nn.Module, int], None] | None = None
) -> list[str]:
    """Put one adapter for each config into `model`, side by side in a bank a layer; return the names of the layers.

    `fill(model, i)` is called while adapter i alone is in the model, for example to load its file. ValueError for a
    method that keeps state beside its layers, or a config that changes the base all would share.
    """
    for number, config in enumerate(configs):
        _check_private(number, config)
    found: list[dict[str, Adapter]] = []
    for number, config in enumerate(configs):
        inject_adapters(model, config)
        if fill is not None:
            fill(model, number)
        found.append(dict(adapters(model)))
        for name, adapter in found[-1].items():
            model.set_submodule(name, adapter.base_layer)
    names = list(dict.fromkeys(name for layers in found for name in layers))
    for name in names:
        model.set_submodule(name, AdapterBank([layers.get(name) for layers in found]))
    return names


@contextmanager
def routed(model: nn.Module, routes: Sequence[int]) -> Iterator[None]:
    """Send row i of a batch through adapter `routes[i]` of the model's banks, in the order of `inject_bank`."""
    banks = [module for module in model.modules() if isinstance(module, AdapterBank)]
    known = {int(key) for bank in banks for key in bank.members}
    if unknown := sorted(set(routes) - known - {-1}):
        raise ValueError(f"routes {unknown}: the banks hold adapters {sorted(known)}; -1 is the base")
    for bank in banks:
        bank.routes = list(routes)
    try:
        yield
    finally:
        for bank in banks:
            bank.routes = None


def _check_private(number: int, config: AdapterConfig) -> None:
    """Raise ValueError for an adapter that would change what the others of a bank see."""
    if reason := change_of_base(config):
        raise ValueError(f"adapter {number} of the bank, method {config.method}, {reason}: run it alone")
