"""Turning the linear layers of a model into 4-bit ones, at once or while their weights stream in, and back."""

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from lightning_peft.kernels.codes import Codes, check_blocks
from lightning_peft.quantization.config import Kind, QuantizationConfig
from lightning_peft.quantization.experts import (
    ExpertLinear,
    QuantizedExperts,
    dequantized_experts,
    open_experts,
    projections,
    stack_shape,
    unknown_stacks,
)
from lightning_peft.quantization.linear import CodedWeight, QuantizedLinear
from lightning_peft.quantization.weights import (
    dense_weight,
    is_linear,
    is_transposed,
    linear_shape,
    needs_dense_weight,
)

logger = logging.getLogger(__name__)

WRAPPERS = ("base_layer", "_checkpoint_wrapped_module", "_orig_mod")
"""Parts of a module's name that adapters, activation checkpointing and the compiler add."""


def quantize_linears(model: nn.Module, config: QuantizationConfig) -> list[str]:
    """Replace the model's linear layers by 4-bit ones one at a time, each dense weight freed at once; return the names.

    ValueError names the layers that cannot be quantised, before any is touched.
    """

    def convert(layer: nn.Module) -> CodedWeight:
        if isinstance(layer, ExpertLinear):
            stack = _empty_experts(layer, config)
            stack.load_dense_(layer.matrices())
            return stack
        coded = QuantizedLinear.from_weight(
            dense_weight(layer).contiguous(), layer.bias, config.kind.name, config.block_size,  # type: ignore[arg-type]
            config.double_quantization,
        )  # fmt: skip
        coded.transposed = is_transposed(layer)
        return coded

    return _replace_linears(model, config, convert)


def prepare_quantized(model: nn.Module, config: QuantizationConfig) -> list[str]:
    """Replace the linear layers of a model on the meta device by 4-bit ones without values; return their names.

    Each weight is then handed to `load_weight` as it is read, so that no more than one is dense at a time.
    """

    def convert(layer: nn.Module) -> CodedWeight:
        if isinstance(layer, ExpertLinear):
            return _empty_experts(layer, config)
        out_features, in_features = linear_shape(layer)
        weight = dense_weight(layer)
        empty = QuantizedLinear(
            in_features, out_features, False, config.kind.name, config.block_size,
            config.double_quantization, dtype=weight.dtype, device=weight.device,
        )  # fmt: skip
        empty.bias = layer.bias  # type: ignore[assignment]
        empty.transposed = is_transposed(layer)
        return empty

    return _replace_linears(model, config, convert)


def _empty_experts(layer: ExpertLinear, config: QuantizationConfig) -> QuantizedExperts:
    return QuantizedExperts(
        layer.shape, layer.transposed, config.kind.name, config.block_size, config.double_quantization,
        dtype=layer.weight.dtype,
    )  # fmt: skip


def load_weight(model: nn.Module, name: str, weight: Tensor) -> bool:
    """Give a dense weight to the layer that stands for the parameter of that name, quantising it where it is coded.

    The result is False when the model has the parameter itself. Codes stay on the weight's device.
    """
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    layer = module if leaf == "weight" else getattr(module, leaf, None)
    if isinstance(layer, ExpertLinear) and layer is not module:
        layer.weight = nn.Parameter(weight, requires_grad=False)
    elif isinstance(layer, QuantizedLinear | QuantizedExperts):
        layer.load_dense_(weight.mT.contiguous() if layer.transposed else weight)
    else:
        return False
    return True


def dequantized_layer(layer: nn.Module) -> nn.Module:
    """Return a frozen dense layer, of a stack of experts too, with the weights of a coded one."""
    return dequantized_experts(layer) if isinstance(layer, QuantizedExperts) else dequantized_linear(layer)


def dequantize_modules(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Put dense layers in the place of those named layers that are coded, and return their names."""
    coded = [name for name in names if isinstance(model.get_submodule(name), QuantizedLinear)]
    for name in coded:
        model.set_submodule(name, dequantized_linear(model.get_submodule(name)))
    return coded


def dequantized_linear(layer: nn.Module) -> nn.Linear | Conv1D:
    """Return a frozen dense layer with a 4-bit layer's weight, in the dtype it computes in, and its bias."""
    if not isinstance(layer, QuantizedLinear):
        raise TypeError(f"{type(layer).__name__} is not quantised")
    if layer.transposed:
        with torch.device("meta"):
            transposed = Conv1D(layer.out_features, layer.in_features)
        transposed.weight = nn.Parameter(layer.dequantize().t().contiguous(), requires_grad=False)
        transposed.bias = layer.bias  # type: ignore[assignment]
        return transposed.train(layer.training)
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(layer.dequantize(), requires_grad=False)
    linear.register_parameter("bias", layer.bias)
    return linear.train(layer.training)


def weights_fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 over every dequantised weight: the same before and after adapting, sharding and saving.

    Sharded weights are gathered one at a time, so every rank must call it.
    """
    return combined_fingerprint(layer_fingerprints(model))


def layer_fingerprints(module: nn.Module, name: str = "") -> dict[str, str]:
    """Return the SHA-256 of each coded layer's dequantised weight, by its name below `name`, the module's."""
    found = {}
    for path, layer in module.named_modules(prefix=name):
        if isinstance(layer, CodedWeight):
            device = (layer.weight if layer.absmax_scale is None else layer.absmax_scale).device
            # FSDP leaves buffers on the device when it offloads its slices.
            whole = (t.full_tensor() if isinstance(t, DTensor) else t for t in layer.codes)
            codes = Codes(*(None if t is None else t.to(device) for t in whole))  # type: ignore[arg-type]
            weight = layer.dequantized(codes, torch.float32)
            found[_plain_name(path)] = hashlib.sha256(weight.cpu().numpy().data).hexdigest()
    return found


def combined_fingerprint(layers: Mapping[str, str]) -> str:
    """Return the fingerprint of a model from those of its layers, in any order."""
    return hashlib.sha256("".join(f"{name} {layers[name]} " for name in sorted(layers)).encode()).hexdigest()


def memory_by_group(model: nn.Module) -> dict[str, int]:
    """Return the bytes of the model's tensors on this rank: codes, scales, embeddings (and head), trainable, other.

    A tied tensor counts once, a sharded one with its local part; the state of the optimiser is no part of it.
    """
    groups = dict.fromkeys(("codes", "scales", "embeddings", "trainable", "other"), 0)
    seen: set[int] = set()
    head = _output_head(model)
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if tensor.requires_grad:
                group = "trainable"
            elif isinstance(module, CodedWeight) and name != "bias":
                group = "codes" if name == "weight" else "scales"
            else:
                group = "embeddings" if isinstance(module, nn.Embedding) or module is head else "other"
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            groups[group] += local.nbytes
    return groups


def bits_per_parameter(model: nn.Module) -> float:
    """Return the stored bits for each weight of the model's 4-bit layers, codes and scales; 0 when it has none."""
    layers = [layer for layer in model.modules() if isinstance(layer, CodedWeight)]
    stored = sum(tensor.nbytes for layer in layers for tensor in layer.codes if tensor is not None)
    weights = sum(math.prod(layer.shape) for layer in layers)
    return 8 * stored / weights if weights else 0.0


def _replace_linears(
    model: nn.Module, config: QuantizationConfig, convert: Callable[[nn.Module], CodedWeight]
) -> list[str]:
    linears, stacks = _names_to_quantize(model, config)
    open_experts(model, stacks)
    names = [*linears, *stacks]
    for name in names:
        layer = model.get_submodule(name)
        model.set_submodule(name, convert(layer).train(layer.training))
    logger.info(
        "%d linear layers%s stored as %s, %s, %.3f bits a weight",
        len(linears),
        f" and {len(stacks)} stacks of experts" if stacks else "",
        config.kind.name,
        "a scale a row" if config.kind is Kind.int8 else f"block size {config.block_size}",
        bits_per_parameter(model),
    )  # fmt: skip
    return names


def _names_to_quantize(model: nn.Module, config: QuantizationConfig) -> tuple[list[str], list[str]]:
    """Return the names of the linear layers and of the stacks of experts. ValueError as `quantize_linears` has it."""
    if not config.is_on:
        raise ValueError("quantization.kind=none: there is nothing to quantise to; use nf4 or fp4")
    unused = set(config.exclude)
    head = _output_head(model)
    names: list[str] = []
    stacks: list[str] = []
    read: list[str] = []
    for name, module in model.named_modules():
        hits = {pattern for pattern in config.exclude if _matches(pattern, name)}
        unused -= hits
        if hits or module is head or name.rpartition(".")[2] == "lm_head":
            continue
        parent, _, leaf = name.rpartition(".")
        if is_linear(module) and needs_dense_weight(model.get_submodule(parent), leaf):
            read.append(name)
            continue
        if problem := _refusal(name, module, config):
            raise ValueError(
                f"quantization.kind={config.kind.name}: {name} {problem}; quantization.exclude keeps a layer dense"
            )
        if is_linear(module):  # a subclass may have another forward, such as a router's
            names.append(name)
        for own in projections(module):
            whole = f"{name}.{own}"
            hits = {pattern for pattern in config.exclude if _matches(pattern, whole)}
            unused -= hits
            if hits:
                continue
            problem = None if config.kind is Kind.int8 else check_blocks(stack_shape(module, own)[2], config.block_size)
            if problem:
                raise ValueError(
                    f"quantization.kind={config.kind.name}: {whole} {problem}; quantization.exclude keeps it dense"
                )
            stacks.append(whole)
    if read:
        logger.info("%d layers stay dense, as the model reads their weights itself: %s", len(read), ", ".join(read[:3]))
    if unused:
        raise ValueError(f"quantization.exclude={sorted(unused)}: matches no module of the model")
    if not names and not stacks:
        raise ValueError(f"quantization.kind={config.kind.name}: the model has no linear layer to quantise")
    return names, stacks


def _refusal(name: str, module: nn.Module, config: QuantizationConfig) -> str | None:
    """Return why a module that holds linear weights cannot be quantised; None when it can or holds none."""
    if is_linear(module):
        return check_blocks(linear_shape(module)[1], config.block_size) if config.kind is not Kind.int8 else None
    for own, _ in unknown_stacks(name, module):
        return f"holds its experts in one 3-D parameter ({own}), which cannot be stored as {config.kind.name}"
    return None


def _matches(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) or name.endswith(f".{pattern}")


def _output_head(model: nn.Module) -> nn.Module | None:
    get_head = getattr(model, "get_output_embeddings", None)
    return get_head() if get_head is not None else None


def _plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
