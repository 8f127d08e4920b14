"""Layers that read one input, adapted together: queries, keys and values, or gate and up.

The stored state is each layer's own, as everywhere; the first layer of a group that a model calls computes them all,
and the others hand out the outputs found for them. A layer that is called with another input computes by itself.
"""

from collections.abc import Iterable, Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter
from lightning_peft.adapters.dora import DoRALinear
from lightning_peft.adapters.lora import LoRALinear
from lightning_peft.kernels.shared_input import add_low_rank_to_each, can_share
from lightning_peft.quantization.frozen_base import frozen_base
from lightning_peft.quantization.weights import dense_dtype

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("w1", "w3"))
"""Names of the layers of one module that read one input, where they do."""
SHARING_DEVICES = {"cuda"}
"""Devices whose products are called one by one, so that fewer are faster. A CPU's kernels take one layer at a time."""


class SharedInput:
    """Layers that are computed together; one by itself has its factors cast with the rest of the model's."""

    def __init__(self, layers: Sequence[LoRALinear]):
        self.layers = tuple(layers)
        self.x: Tensor | None = None
        self.waiting: list[Tensor] = []
        """Outputs of the last layers for `x`, the next one's at the end."""
        self.copies: tuple[Tensor, tuple[Tensor, ...]] | None = None

    def output(self, place: int, x: Tensor) -> Tensor | None:
        """Return the output of the layer at a place for x (..., in_features); None where it must compute by itself."""
        if self.waiting and x is self.x and place == len(self.layers) - len(self.waiting):
            output = self.waiting.pop()
            if not self.waiting:
                self.x = None
            return self.layers[place].of_sum(output)
        self.waiting, self.x = [], None
        if place or not self._suits(x):
            return None
        bases = [frozen_base(own.base_layer, x) for own in self.layers]
        pairs = zip(self.layers, bases, strict=True)
        known = [layer.summed_base(base) for layer, base in pairs if base is not None]
        if len(known) < len(bases) or not can_share(known):
            return None
        factors = [own.factors() for own in self.layers]
        copies = self.copies
        if copies is not None and copies[0].dtype != known[0].dtype:
            copies = None
        first, *others = add_low_rank_to_each(known, x, factors, self.layers[0].scaling, copies)
        if others:
            self.x, self.waiting = x, others[::-1]
        return self.layers[0].of_sum(first)

    def _suits(self, x: Tensor) -> bool:
        return (
            x.device.type in SHARING_DEVICES
            and torch.is_grad_enabled()
            and all(
                layer.enabled
                and layer.training
                and not layer.active_dropout
                and layer.scaling == self.layers[0].scaling
                for layer in self.layers
            )
        )

    def all_factors(self) -> list[Tensor]:
        """Return every A, then every B."""
        A, B = zip(*(layer.factors() for layer in self.layers), strict=True)
        return [*A, *B]

    def make_copies(self) -> list[Tensor]:
        """Take the factors in the dtype of the base, all A in one tensor; return the copies in their order."""
        count, factors = len(self.layers), [factor.detach() for factor in self.all_factors()]
        dtype = dense_dtype(self.layers[0].base_layer)
        stack = torch.cat(factors[:count]).to(dtype)
        self.copies = stack, tuple(factor.to(dtype) for factor in factors[count:])
        return [*stack.split([len(A) for A in factors[:count]]), *self.copies[1]]


def is_plain(layer: nn.Module) -> TypeGuard[LoRALinear]:
    """Return whether a layer is a LoRA or a DoRA whose two factors train and are what its products take."""
    return (
        isinstance(layer, LoRALinear)
        and type(layer).fused in (LoRALinear.fused, DoRALinear.fused)
        and type(layer).factors is LoRALinear.factors
        and type(layer).forward is Adapter.forward
        and all(factor.requires_grad for factor in layer.factors())
    )


def share_inputs(model: nn.Module) -> list[SharedInput]:
    """Have the layers that share an input computed together, in training, and return the groups.

    Each plain layer is in one group, alone where nothing is known to read its input.
    """
    groups: list[SharedInput] = []
    for module in list(model.modules()):
        own = {name: child for name, child in module.named_children() if is_plain(child)}
        named = [tuple(own.pop(name) for name in names) for names in GROUPS if own.keys() >= set(names)]
        groups += [SharedInput(layers) for layers in (*named, *((layer,) for layer in own.values()))]
    for group in groups:
        for place, layer in enumerate(group.layers):
            layer.shared_input = (group, place)
    return groups


class FactorCopies:
    """The needs of all groups in a forward pass: their factors in the dtype of the products, and the norms of DoRA."""

    def __init__(self, groups: Iterable[SharedInput]):
        self.groups = list(groups)
        self.copies: list[Tensor] = []
        self.factors: list[Tensor] = []

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the factors as they are now."""
        factors = [factor for group in self.groups for factor in group.all_factors()]
        same = len(factors) == len(self.factors) and all(a is b for a, b in zip(factors, self.factors, strict=True))
        if same and all(a.device == b.device for a, b in zip(self.copies, factors, strict=True)):
            torch._foreach_copy_(self.copies, factors)
            return
        self.factors, self.copies = factors, [copy for group in self.groups for copy in group.make_copies()]

    def before_forward(self, module: nn.Module, inputs: object) -> None:
        """Refresh where the forward pass that begins reads copies: a forward pre-hook."""
        first = self.groups[0].layers[0]
        on_device = first.factors()[0].device.type in SHARING_DEVICES
        if not (on_device and module.training and torch.is_grad_enabled()):
            return
        for group in self.groups:
            for layer in group.layers:
                layer.before_step()
        if dense_dtype(first.base_layer).itemsize == 2:
            self.refresh()


def adapt_together(model: nn.Module, decoder: nn.Module, is_sharded: bool = False) -> None:
    """Share inputs, and have the factors cast once whenever the decoder runs in training.

    Factors that ranks hold slices of are whole inside their block only, and are cast there.
    """
    groups = share_inputs(model)
    if groups and not is_sharded:
        decoder.register_forward_pre_hook(FactorCopies(groups).before_forward)
