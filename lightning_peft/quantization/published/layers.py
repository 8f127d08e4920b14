"""The layers of a model that a published checkpoint holds in few bits."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_peft.kernels.codes import Codes
from lightning_peft.quantization.experts import QuantizedExperts, open_experts, projections, stack_shape
from lightning_peft.quantization.linear import CodedWeight, QuantizedLinear
from lightning_peft.quantization.published.format import LowBitWeight, PublishedFormat
from lightning_peft.quantization.weights import is_linear, is_transposed, linear_shape, needs_dense_weight


def prepare_low_bit(model: nn.Module, names: Mapping[str, str], form: PublishedFormat) -> list[str]:
    """Put coded layers without values in the place of those whose parameters have these names; return which.

    The parameters are given with their layers' names in the checkpoint. Layers are left out that the model does not
    call as linear ones: their weights have to be dense. ValueError for a stack of experts that cannot be a layer.
    """
    linears, stacks = [], []
    for name in names:
        holder, _, leaf = name.rpartition(".")
        module = model.get_submodule(holder)
        if leaf in projections(module):
            stacks.append(name)
        elif module.get_parameter(leaf).ndim > 2:
            raise ValueError(
                f"{name} is published in {form.describe()}, and {type(module).__name__} computes with it in a way that "
                "cannot be done on codes; give the original model"
            )
        elif leaf == "weight" and is_linear(module) and not _is_read(model, holder):
            linears.append(name)
    open_experts(model, stacks)
    for name in linears:
        holder = name.rpartition(".")[0]
        module = model.get_submodule(holder)
        rows, columns = linear_shape(module)
        empty = form.layout(names[name], rows, columns)
        layer = QuantizedLinear(
            columns, rows, False, empty.kind, empty.block_size, False, dtype=module.get_parameter("weight").dtype
        )
        layer.bias = module.bias  # type: ignore[assignment]
        layer.transposed = is_transposed(module)
        layer.load_codes_(empty.codes)
        model.set_submodule(holder, layer.train(module.training))
    for name in stacks:
        holder, _, leaf = name.rpartition(".")
        stack = model.get_submodule(name)
        shape = stack_shape(model.get_submodule(holder), leaf)
        empty = form.layout(names[name], *shape[1:])
        if leaf == "gate_up_proj" and (shape[1] // 2) % empty.block_size:
            empty = scale_a_row(empty)  # no block of the two projections lies in both
        coded = QuantizedExperts(
            shape,
            bool(stack.transposed),
            empty.kind,
            empty.block_size,
            False,
            dtype=stack.get_parameter("weight").dtype,
        )
        coded.load_codes_(Codes(*(None if t is None else t.new_empty(shape[0], *t.shape) for t in empty.codes)))  # type: ignore[arg-type]
        model.set_submodule(name, coded.train(stack.training))
    return [*linears, *stacks]


def _is_read(model: nn.Module, name: str) -> bool:
    parent, _, leaf = name.rpartition(".")
    return needs_dense_weight(model.get_submodule(parent), leaf)


def load_low_bit(model: nn.Module, name: str, weight: LowBitWeight) -> None:
    """Give the layer that stands for the parameter of that name its codes.

    Raises ValueError where the codes are of another shape.
    """
    holder, _, leaf = name.rpartition(".")
    layer = model.get_submodule(holder if leaf == "weight" else name)
    assert isinstance(layer, CodedWeight)
    codes = weight.codes
    if codes.weight.shape != layer.weight.shape or weight.kind != layer.kind:
        raise ValueError(
            f"{name} has {weight.kind} codes of shape {tuple(codes.weight.shape)} in the file and {layer.kind} ones of "
            f"{tuple(layer.weight.shape)} in the model: its configuration belongs to other weights"
        )
    layer.block_size = weight.block_size
    layer.load_codes_(codes)


def dense_low_bit(weight: LowBitWeight, dtype: torch.dtype) -> Tensor:
    """Return the dense (out, in) weight that codes stand for."""
    return torch.ops.lightning_peft.dequantize(*weight.codes, weight.kind, weight.block_size, dtype)


def scale_a_row(weight: LowBitWeight) -> LowBitWeight:
    """Return the same weight with scales for every row, also where they were published for blocks of rows."""
    rows, scales = weight.codes.weight.shape[-2], weight.codes.absmax
    if scales.shape[-2] == rows:
        return weight
    spread = scales.repeat_interleave(weight.block_size, -2)[..., :rows, :].contiguous()
    return weight._replace(codes=weight.codes._replace(absmax=spread))
