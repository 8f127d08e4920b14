"""Several adapters of any method on one frozen base, to train: each row of a batch goes through its own."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter, AdapterConfig
from lightning_peft.adapters.inject import adapters, inject_adapters
from lightning_peft.adapters.segments import change_of_base


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
        self.routes: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map (rows, ..., in_features) to (rows, ..., out_features)."""
        if self.routes is None or len(self.routes) != len(x):
            raise RuntimeError(f"a batch of {len(x)} rows needs as many routes: call the model inside `routed`")
        routes = self.routes.to(x.device)
        rows, outputs = [], []
        for route in self.routes.unique().tolist():
            chosen = (routes == route).nonzero().flatten()
            # The base's product of these rows is taken with their change: in 16 bits it would else be rounded first,
            # and a small change be lost in it.
            layer = self.members[str(route)] if str(route) in self.members else self.base_layer
            outputs.append(layer(x.index_select(0, chosen)))
            rows.append(chosen)
        return torch.cat(outputs).index_select(0, torch.cat(rows).argsort())


def inject_bank(
    model: nn.Module, configs: Sequence[AdapterConfig], fill: Callable[[nn.Module, int], None] | None = None
) -> list[str]:
    """Put one adapter for each config into `model`, side by side in a bank a layer; the names of the layers.

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
    """Inside, row i of a batch goes through adapter `routes[i]` of the model's banks, in the order of `inject_bank`."""
    banks = [module for module in model.modules() if isinstance(module, AdapterBank)]
    known = {int(key) for bank in banks for key in bank.members}
    if unknown := sorted(set(routes) - known - {-1}):
        raise ValueError(f"routes {unknown}: the banks hold adapters {sorted(known)}; -1 is the base")
    for bank in banks:
        bank.routes = torch.tensor(routes)
    try:
        yield
    finally:
        for bank in banks:
            bank.routes = None


def _check_private(number: int, config: AdapterConfig) -> None:
    """Raise ValueError for an adapter that would change what the others of a bank see."""
    if reason := change_of_base(config):
        raise ValueError(f"adapter {number} of the bank, method {config.method}, {reason}: run it alone")
