"""Layers that read one input, adapted together: queries, keys and values, or gate and up.

The stored state is each layer's own, as everywhere; the first layer of a group that a model calls computes them all,
and the others hand out the outputs found for them. A layer that is called with another input computes by itself.
"""

import logging
from collections.abc import Iterable, Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter
from lightning_peft.adapters.dora import DoRALinear
from lightning_peft.adapters.lora import LoRALinear
from lightning_peft.adapters.wide_weights import have_edges, make_edges, take_back
from lightning_peft.kernels.frozen_linear import Base
from lightning_peft.kernels.inside_product import Edges, add_low_rank_inside, copy_together
from lightning_peft.kernels.shared_input import add_low_rank_to_each, can_share
from lightning_peft.quantization.frozen_base import frozen_base
from lightning_peft.quantization.weights import dense_dtype

logger = logging.getLogger(__name__)

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("w1", "w3"))
"""Names of the layers of one module that read one input, where they do."""
SINGLE = {"o_proj": False, "down_proj": True, "w2": True}
"""Names of layers whose output's gradient, and, where true, whose input elementwise operations make, as they do the
ones of `GROUPS`: a compiler then writes them into wider rows. Attention is none."""
SHARING_DEVICES = {"cuda"}
"""Devices whose products are called one by one, so that fewer are faster. A CPU's kernels take one layer at a time."""


class SharedInput:
    """Layers that are computed together; one by itself has its factors cast with the rest of the model's."""

    def __init__(self, layers: Sequence[LoRALinear], takes_wide_input: bool | None = None):
        self.layers = tuple(layers)
        self.takes_wide_input = takes_wide_input
        """A compiler makes their input in wider rows; false: the gradient of their output alone, None: neither."""
        self.x: Tensor | None = None
        self.waiting: list[Tensor] = []
        """Outputs of the last layers for `x`, the next one's at the end."""
        self.copies: tuple[Tensor, tuple[Tensor, ...]] | None = None
        self.edges: Edges | None = None
        """The copies beside and below the weights, where the changes are computed inside the frozen products."""

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
        first, *others = self._outputs(known, x)
        if others:
            self.x, self.waiting = x, others[::-1]
        return self.layers[0].of_sum(first)

    def _outputs(self, bases: list[Base], x: Tensor) -> tuple[Tensor, ...]:
        factors, scaling, copies = [own.factors() for own in self.layers], self.layers[0].scaling, self.copies
        if copies is not None and copies[0].dtype != bases[0].dtype:
            copies = None
        if self.edges is not None and copies is not None and x.dtype == bases[0].dtype:
            return add_low_rank_inside(bases, self.edges, x, factors, scaling)
        return add_low_rank_to_each(bases, x, factors, scaling, copies)

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

    def make_copies(self, in_weights: bool) -> list[Tensor]:
        """Make room for the factors in the dtype of the base, all A in one tensor; return the places in their order.

        With `in_weights` the places are at the edges of the weights, as far as there is room.
        """
        if self.edges is not None and have_edges(self.layers, self.edges):
            take_back(self.layers)
        self.edges = None
        if in_weights and self.takes_wide_input is not None:
            self.edges = make_edges(self.layers, self.takes_wide_input)
        factors, dtype = self.all_factors(), dense_dtype(self.layers[0].base_layer)
        A, B = factors[: len(self.layers)], factors[len(self.layers) :]
        if self.edges is None:
            self.copies = torch.cat(A).to(dtype), tuple(torch.empty_like(factor, dtype=dtype) for factor in B)
        else:
            self.copies = self.edges.stack, self.edges.factors
        return [*self.copies[0].split([len(factor) for factor in A]), *self.copies[1]]


def is_plain(layer: nn.Module) -> TypeGuard[LoRALinear]:
    """Return whether a layer is a LoRA or a DoRA whose two factors train and are what its products take."""
    return (
        isinstance(layer, LoRALinear)
        and type(layer).fused in (LoRALinear.fused, DoRALinear.fused)
        and type(layer).factors is LoRALinear.factors
        and type(layer).forward is Adapter.forward
        and all(factor.requires_grad for factor in layer.factors())
    )


def input_groups(model: nn.Module) -> list[SharedInput]:
    """Return the groups of plain layers: each is in one, alone where nothing is known to read its input."""
    groups: list[SharedInput] = []
    for module in list(model.modules()):
        own = {name: child for name, child in module.named_children() if is_plain(child)}
        named = [tuple(own.pop(name) for name in names) for names in GROUPS if own.keys() >= set(names)]
        groups += [SharedInput(layers, takes_wide_input=True) for layers in named]
        groups += [SharedInput((layer,), SINGLE.get(name)) for name, layer in own.items()]
    return groups


def share_inputs(model: nn.Module) -> list[SharedInput]:
    """Have the layers that share an input computed together, in training, and return the groups."""
    groups = input_groups(model)
    for group in groups:
        for place, layer in enumerate(group.layers):
            layer.shared_input = (group, place)
    return groups


class FactorCopies:
    """The needs of all groups in a forward pass: their factors in the dtype of the products, and the norms of DoRA."""

    def __init__(self, groups: Iterable[SharedInput], in_weights: bool = False):
        self.groups = list(groups)
        self.in_weights = in_weights
        self.copies: list[Tensor] = []
        self.factors: list[Tensor] = []

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the factors as they are now."""
        factors = [factor.detach() for group in self.groups for factor in group.all_factors()]
        if not self._fit(factors):
            self.copies = [copy for group in self.groups for copy in group.make_copies(self.in_weights)]
            if self.in_weights:
                inside = sum(group.edges is not None for group in self.groups)
                logger.info(
                    "%d of %d groups of adapted layers have their change inside the frozen products",
                    inside, len(self.groups),
                )  # fmt: skip
        self.factors = factors
        copy_together(factors, self.copies)

    def _fit(self, factors: list[Tensor]) -> bool:
        """Return whether the places are those of these factors, and of the weights as they lie now."""
        places = zip(self.copies, factors, strict=False)
        return (
            len(factors) == len(self.copies)
            and all(a.device == b.device and a.shape == b.shape for a, b in places)
            and all(group.edges is None or have_edges(group.layers, group.edges) for group in self.groups)
        )

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


def adapt_together(model: nn.Module, decoder: nn.Module, is_sharded: bool = False, in_weights: bool = False) -> None:
    """Share inputs, and have the factors cast once whenever the decoder runs in training.

    With `in_weights`, for a model that is compiled, the casts lie at the edges of the frozen weights and the changes
    are computed inside their products. Factors that ranks hold slices of are whole inside their block only, and are
    cast there.
    """
    groups = share_inputs(model)
    if groups and is_sharded and in_weights:
        logger.debug("changes are computed beside the frozen products: ranks hold slices of weights and factors")
    if groups and not is_sharded:
        decoder.register_forward_pre_hook(FactorCopies(groups, in_weights).before_forward)
