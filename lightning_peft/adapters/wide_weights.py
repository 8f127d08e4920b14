"""Room for the factors of changes at the edges of frozen weights, where they lie during training.

A dense layer's parameter stays the one it was, over the same numbers, now in wider rows: what reads it sees its shape,
and what a model stores is as without room. Codes have none; they are decoded to where there is.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_peft.adapters.lora import LoRALinear
from lightning_peft.kernels.inside_product import Edges, room_for
from lightning_peft.quantization.linear import QuantizedLinear
from lightning_peft.quantization.weights import dense_dtype

LARGEST_RANK = 128
"""The most that the ranks of a group may be together. Products with more columns of factors take longer than what
they save: some 290 at the rates of an H100. Ours."""
DECODED = {"nf4", "fp4"}
"""Kinds of codes whose kernel decodes into wider rows."""


class Room(NamedTuple):
    """The numbers of a group's edges."""

    rows: int
    """Below the weight of `place`."""
    columns: int
    """Beside each weight, where the input is made in wider rows."""
    place: int
    """The layer with all A below it: the narrowest, as its output's gradient is the one made in wider rows."""


def room_of(layers: Sequence[LoRALinear]) -> Room | None:
    """Return the room for layers that read one input; None for ones whose products cannot have the changes inside.

    These are bases that train or are of several kinds, dropped inputs, scalings that differ, and high ranks.
    """
    if any(layer.dropout or layer.scaling != layers[0].scaling for layer in layers):
        return None
    bases = [layer.base_layer for layer in layers]
    is_dense = all(type(base) is nn.Linear and not base.weight.requires_grad for base in bases)
    is_coded = all(type(base) is QuantizedLinear and base.kind in DECODED for base in bases)
    if not (is_dense or is_coded) or len({dense_dtype(base) for base in bases}) > 1:
        return None
    ranks, widths = [len(A) for A, _ in factors_of(layers)], [len(B) for _, B in factors_of(layers)]
    if sum(ranks) > LARGEST_RANK:
        return None
    rows, columns = room_for(min(widths), ranks), room_for(layers[0].lora_A.in_features, ranks)
    return Room(rows, columns, widths.index(min(widths)))


def factors_of(layers: Sequence[LoRALinear]) -> list[tuple[Tensor, Tensor]]:
    return [layer.factors() for layer in layers]


@torch.no_grad()
def make_edges(layers: Sequence[LoRALinear], takes_wide_input: bool) -> Edges | None:
    """Make room for the factors of layers that read one input, in the dtype of their products; None without any.

    `takes_wide_input` tells whether something makes their input in wider rows.
    """
    room = room_of(layers)
    if room is None or not _have_own_weights(layers):
        return None
    place = room.place
    ranks = [len(A) for A, _ in factors_of(layers)]
    columns = room.columns if takes_wide_input else 0
    whole = [_edge(layer, room.rows if own == place else 0, columns) for own, layer in enumerate(layers)]
    in_features, out_features = layers[place].lora_A.in_features, layers[place].lora_B.out_features
    if isinstance(layers[0].base_layer, nn.Linear):
        below, first = whole[place][:, :in_features], (out_features, in_features)
        beside = [own[: layer.lora_B.out_features] for own, layer in zip(whole, layers, strict=True)]
    else:
        below, first, beside = whole[place].new_zeros(room.rows, in_features), (0, 0), whole
    stack = below[first[0] : first[0] + sum(ranks)]
    if not takes_wide_input:
        return Edges(place, below, stack, (), tuple(below.new_empty(B.shape) for _, B in factors_of(layers)))
    starts = [first[1] + sum(ranks[:own]) for own in range(len(ranks))]
    parts = zip(beside, starts, ranks, strict=True)
    return Edges(place, below, stack, tuple(beside), tuple(own[:, start : start + rank] for own, start, rank in parts))


def _have_own_weights(layers: Sequence[LoRALinear]) -> bool:
    """Return whether no dense weight is a part of a larger tensor, such as another adapter's wide one."""
    weights = (layer.base_layer.weight for layer in layers if isinstance(layer.base_layer, nn.Linear))
    return all(weight.untyped_storage().nbytes() == weight.nbytes for weight in weights)


def _edge(layer: LoRALinear, rows: int, columns: int) -> Tensor:
    """Return a coded layer's (out, columns); a dense one's whole weight, (out + rows, in + columns), now its own."""
    base = layer.base_layer
    if not isinstance(base, nn.Linear):
        factor = layer.factors()[1]
        return factor.new_zeros(len(factor), columns, dtype=dense_dtype(base))
    weight = base.weight
    size, width = weight.shape
    if not rows and not columns:
        return weight.detach()
    whole = weight.new_zeros(size + rows, width + columns)
    whole[:size, :width] = weight
    weight.data = whole[:size, :width]
    return whole


@torch.no_grad()
def take_back(layers: Sequence[LoRALinear]) -> None:
    """Give dense weights tensors of their own again."""
    for layer in layers:
        if isinstance(layer.base_layer, nn.Linear):
            layer.base_layer.weight.data = layer.base_layer.weight.data.clone(memory_format=torch.contiguous_format)


def have_edges(layers: Sequence[LoRALinear], edges: Edges) -> bool:
    """Return whether dense weights still lie beside these edges: moving a model makes tensors of their own."""
    owners = edges.beside or (edges.below,)
    bases = [layer.base_layer for layer in layers]
    pairs = zip(bases, owners, strict=True)
    return all(not isinstance(base, nn.Linear) or _storage(base.weight) == _storage(own) for base, own in pairs)


def _storage(tensor: Tensor) -> int:
    number: int = tensor.untyped_storage()._cdata
    return number
