"""Adapters written into the weights they change: the one merge there is."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lightning_peft.adapters.ends import is_tied, untie
from lightning_peft.adapters.inject import SHARED, adapters
from lightning_peft.adapters.new_biases import add_biases, bias_options
from lightning_peft.quantization.experts import ExpertLinear, QuantizedExperts, close_experts, open_experts
from lightning_peft.quantization.linear import CodedWeight
from lightning_peft.quantization.quantize import dequantized_layer
from lightning_peft.quantization.weights import dense_weight, is_quantized, write_weight

Model = TypeVar("Model", bound=nn.Module)

GIVEN = "weights_of_the_adapter"
"""Attribute of the model with a `Given` by name for each frozen weight of the base that the adapter's file changes."""


class Given(NamedTuple):
    """The change that an adapter's file makes to a weight of its base that does not train."""

    change: Callable[[Tensor], Tensor]
    """Turns the weight as published, fp32, into the one the adapter was trained on."""
    is_new: bool = False
    """True where the base has no such weight, and got one of zeros."""
    stored: tuple[str, Tensor] | None = None
    """Name and tensor that say so in a file; None for the weight itself."""
    rows: tuple[int, ...] = ()
    """The rows that the tensor has; empty where the change is of another kind."""


@torch.no_grad()
def merge_adapters(
    model: Model,
    dtype: torch.dtype | None = None,
    requantise: bool = False,
    original: Model | None = None,
    from_codes: bool = False,
) -> Model:
    """Add every change to its base weight, in fp32 and rounded once, and put the base layer in the adapter's place.

    A weight is stored in its own dtype, or in `dtype` where that holds more. A quantised layer becomes a dense one
    with the weights its adapter was trained on, or with `requantise` the nearest codes to the sum. `original` is the
    base as published: it gets the changes, the modules and biases trained in full, and the weights of the base that
    came with the adapter; with `from_codes` also those that the codes of `model` stand for, so that the sum is to what
    the adapter was trained on. Return the merged model, which is `original` where one is given and nothing is
    requantised. Raise NotMergeableError, with the models untouched, when a method cannot be merged.
    """
    found = dict(adapters(model))
    for layer in found.values():
        layer.check_mergeable()
    given: dict[str, Given] = getattr(model, GIVEN, {})
    new = [name.replace(".base_layer", "") for name, one in given.items() if one.is_new]
    new_biases = bias_options(model, new) if new else {}
    if original is not None and is_tied(original) and not is_tied(model):
        untie(original)
    result = model if original is None or requantise else original
    if result is not model:
        add_biases(result, new_biases)
        stacks = [n for n, m in model.named_modules() if isinstance(m, QuantizedExperts | ExpertLinear)]
        open_experts(result, [name.removesuffix(".base_layer") for name in stacks])
        for name, one in given.items():
            parameter = result.get_parameter(name.replace(".base_layer", ""))
            kept = torch.promote_types(parameter.dtype, dtype or parameter.dtype)
            parameter.data = one.change(parameter.float()).to(parameter.device, kept)
    inside = (*(f"{name}." for name in found), f"{SHARED}.")
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and not n.startswith(inside)}
    for name, layer in found.items():
        delta, delta_bias = layer.delta_weight(), layer.delta_bias()
        target = layer.base_layer if result is model else result.get_submodule(name)
        target = _writable(target, dtype, requantise)
        start = dense_weight(target).float()
        if result is model or (from_codes and is_quantized(layer.base_layer)):
            start = dense_weight(layer.base_layer).float()
        elif (taken := layer.taken_from_base()) is not None:
            delta = delta - taken  # the start rewrote the change's base, and this base is as published
        write_weight(target, (start + delta).to(_stored_dtype(target)), requantize=True)
        bias: Any = getattr(target, "bias", None)
        own_bias: Any = getattr(layer.base_layer, "bias", None)
        if result is not model and own_bias is not None and own_bias.requires_grad:  # another bias is as published
            bias.copy_(own_bias)
        if delta_bias is not None:
            bias.copy_(bias.float() + delta_bias)
        result.set_submodule(name, target)
    for name, module in list(model.named_modules()):
        if not isinstance(module, CodedWeight) or requantise or name.startswith(inside):
            continue
        if result is model:
            result.set_submodule(name, dequantized_layer(module))
        elif is_quantized(published := result.get_submodule(name)):
            result.set_submodule(name, dequantized_layer(published))
        elif from_codes:
            target = _writable(published, dtype, requantise)
            write_weight(target, dense_weight(dequantized_layer(module)))
            result.set_submodule(name, target)
    if result is not model:
        for name, parameter in trained.items():
            target_parameter = result.get_parameter(name)
            wider = torch.promote_types(target_parameter.dtype, dtype or target_parameter.dtype)
            target_parameter.data = parameter.to(wider)
    if result is model:
        add_biases(result, new_biases)  # the zeros of layers that the adapter leaves alone
    if hasattr(result, SHARED):
        delattr(result, SHARED)
    close_experts(result)
    return result


def _writable(layer: nn.Module, dtype: torch.dtype | None, requantise: bool) -> nn.Module:
    """Return a layer that holds the sum with no rounding but the one to `dtype`, or to codes."""
    if isinstance(layer, CodedWeight):
        if requantise:
            return layer
        layer = dequantized_layer(layer)
    return layer if dtype is None else layer.to(torch.promote_types(_stored_dtype(layer), dtype))


def _stored_dtype(layer: nn.Module) -> torch.dtype:
    dtype: Any = layer.dtype if isinstance(layer, CodedWeight) else layer.weight.dtype
    return dtype
