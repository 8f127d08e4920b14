"""Turning the linear layers of a model into 4-bit ones, at once or while their weights stream in, and back."""

import hashlib
import logging
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from lightning_peft.kernels.codes import Codes, check_blocks, dequantize
from lightning_peft.quantization.config import Kind, QuantizationConfig
from lightning_peft.quantization.linear import QuantizedLinear

logger = logging.getLogger(__name__)

WRAPPERS = ("base_layer", "_checkpoint_wrapped_module", "_orig_mod")
"""Parts of a module's name that adapters, activation checkpointing and the compiler add."""


def quantize_linears(model: nn.Module, config: QuantizationConfig) -> list[str]:
    """Replace the model's linear layers by 4-bit ones, one at a time, each dense weight freed at once; their names.

    ValueError names the layers that cannot be quantised, before any is touched.
    """

    def convert(layer: nn.Linear) -> QuantizedLinear:
        return QuantizedLinear.from_weight(
            layer.weight, layer.bias, config.kind.name, config.block_size, config.double_quantization
        )

    return _replace_linears(model, config, convert)


def prepare_quantized(model: nn.Module, config: QuantizationConfig) -> list[str]:
    """Replace the linear layers of a model on the meta device by 4-bit ones without values; their names.

    Each weight is then handed to `load_weight` as it is read, so that no more than one is dense at a time.
    """

    def convert(layer: nn.Linear) -> QuantizedLinear:
        empty = QuantizedLinear(
            layer.in_features, layer.out_features, False, config.kind.name, config.block_size,
            config.double_quantization, dtype=layer.weight.dtype, device=layer.weight.device,
        )  # fmt: skip
        empty.bias = layer.bias
        return empty

    return _replace_linears(model, config, convert)


def load_weight(model: nn.Module, name: str, weight: Tensor) -> bool:
    """Quantise a dense weight into the layer whose "<module>.weight" it is; False when that is no 4-bit layer.

    The codes stay on the weight's device.
    """
    module_name, _, leaf = name.rpartition(".")
    layer = model.get_submodule(module_name)
    if leaf != "weight" or not isinstance(layer, QuantizedLinear):
        return False
    layer.load_dense_(weight)
    return True


def dequantized_linear(layer: nn.Module) -> nn.Linear:
    """Return a frozen nn.Linear with a 4-bit layer's dequantised weight, in the dtype it computes in, and its bias."""
    if not isinstance(layer, QuantizedLinear):
        raise TypeError(f"{type(layer).__name__} is not quantised")
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
        if isinstance(layer, QuantizedLinear):
            device = (layer.weight if layer.absmax_scale is None else layer.absmax_scale).device
            # FSDP leaves buffers on the device when it offloads its slices.
            whole = (t.full_tensor() if isinstance(t, DTensor) else t for t in layer.codes)
            codes = Codes(*(None if t is None else t.to(device) for t in whole))  # type: ignore[arg-type]
            weight = dequantize(codes, layer.kind, layer.block_size, torch.float32)
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
            elif isinstance(module, QuantizedLinear) and name != "bias":
                group = "codes" if name == "weight" else "scales"
            else:
                group = "embeddings" if isinstance(module, nn.Embedding) or module is head else "other"
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            groups[group] += local.nbytes
    return groups


def bits_per_parameter(model: nn.Module) -> float:
    """Return the stored bits for each weight of the model's 4-bit layers, codes and scales; 0 when it has none."""
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    stored = sum(tensor.nbytes for layer in layers for tensor in layer.codes if tensor is not None)
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    return 8 * stored / weights if weights else 0.0


def _replace_linears(
    model: nn.Module, config: QuantizationConfig, convert: Callable[[nn.Linear], QuantizedLinear]
) -> list[str]:
    names = _names_to_quantize(model, config)
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        model.set_submodule(name, convert(layer).train(layer.training))
    logger.info(
        "%d linear layers stored as %s, %s, %.3f bits a weight",
        len(names),
        config.kind.name,
        "a scale a row" if config.kind is Kind.int8 else f"block size {config.block_size}",
        bits_per_parameter(model),
    )  # fmt: skip
    return names


def _names_to_quantize(model: nn.Module, config: QuantizationConfig) -> list[str]:
    if not config.is_on:
        raise ValueError("quantization.kind=none: there is nothing to quantise to; use nf4 or fp4")
    unused = set(config.exclude)
    head = _output_head(model)
    names: list[str] = []
    for name, module in model.named_modules():
        hits = {pattern for pattern in config.exclude if _matches(pattern, name)}
        unused -= hits
        if hits or module is head or name.rpartition(".")[2] == "lm_head":
            continue
        if problem := _refusal(module, config):
            raise ValueError(
                f"quantization.kind={config.kind.name}: {name} {problem}; quantization.exclude keeps a layer dense"
            )
        if type(module) is nn.Linear:  # a subclass has a forward of its own, such as a router's
            names.append(name)
    if unused:
        raise ValueError(f"quantization.exclude={sorted(unused)}: matches no module of the model")
    if not names:
        raise ValueError(f"quantization.kind={config.kind.name}: the model has no linear layer to quantise")
    return names


def _refusal(module: nn.Module, config: QuantizationConfig) -> str | None:
    """Return why a module that holds linear weights cannot be quantised; None when it can or holds none."""
    if isinstance(module, Conv1D):
        return "is GPT-2's Conv1D, whose transposed weight cannot be stored as 4-bit rows: use quantization=none"
    if type(module) is nn.Linear and config.kind is not Kind.int8:
        return check_blocks(module.in_features, config.block_size)
    if isinstance(module, nn.Conv1d):
        return None
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim == 3:
            return f"holds its experts in one 3-D parameter ({name}), which cannot be stored in 4 bits"
    return None


def _matches(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) or name.endswith(f".{pattern}")


def _output_head(model: nn.Module) -> nn.Module | None:
    get_head = getattr(model, "get_output_embeddings", None)
    return get_head() if get_head is not None else None


def _plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
