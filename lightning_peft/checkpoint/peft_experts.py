"""Adapters of stacked experts as HF PEFT's `target_parameters` has them, both ways.

HF wraps a module once for each of its parameters, the first one innermost: `experts.base_layer.lora_A.weight` is
gate_up_proj's, `experts.lora_A.weight` down_proj's. HF keeps the factors of all experts in two matrices, A (experts x
rank, in) with an expert's rows together, B (out, rank x experts) with those of a rank together. HF reads off the
module's `is_transposed` which side of a stored matrix is the inputs', so Llama 4's factors are the other way round.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter
from lightning_peft.adapters.inject import adapters
from lightning_peft.adapters.lora import LoRAExperts
from lightning_peft.adapters.method import Shapes
from lightning_peft.checkpoint.peft_parameters import is_weight
from lightning_peft.quantization.experts import PROJECTIONS

FACTORS = ("lora_A", "lora_B")


def expert_layers(model: nn.Module) -> dict[str, LoRAExperts]:
    """Return the adapters around stacks of experts, by name."""
    return {name: layer for name, layer in adapters(model) if isinstance(layer, LoRAExperts)}


def to_peft(model: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors of a file with those of stacked experts by HF's names and in its layout."""
    layers = expert_layers(model)
    found = dict(tensors)
    for name, layer in layers.items():
        A, B = (found.pop(f"{prefix}{name}.{factor}", None) for factor in FACTORS)
        if A is None or B is None:
            continue
        if _swapped(model, name, layer):
            A, B = B.mT, A.mT
        holder = prefix + _wrapper(name, layers)
        found[f"{holder}.lora_A.weight"] = A.reshape(-1, A.shape[-1]).contiguous()
        found[f"{holder}.lora_B.weight"] = B.permute(1, 2, 0).reshape(B.shape[1], -1).contiguous()
    return found


def from_peft(model: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors of a file with those of stacked experts by our names and in our layout."""
    layers = expert_layers(model)
    found = dict(tensors)
    for name, layer in layers.items():
        holder = prefix + _wrapper(name, layers)
        A, B = (found.pop(f"{holder}.{factor}.weight", None) for factor in FACTORS)
        experts = layer.base_layer.shape[0]
        if A is None or B is None or A.shape[0] % experts or B.shape[1] % experts:
            continue  # the comparison of names says so
        A, B = A.reshape(experts, -1, A.shape[1]), B.reshape(B.shape[0], -1, experts).permute(2, 0, 1)
        if _swapped(model, name, layer):
            A, B = B.mT, A.mT
        if len(layer.lora_A) == 1 and torch.equal(A, A[:1].expand_as(A)):  # shared here, and written for each
            A = A[:1]
        found |= {f"{prefix}{name}.{factor}": tensor for factor, tensor in zip(FACTORS, (A, B), strict=True)}
    return found


def matrix_shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of tensors by our names, those of stacked experts as if of a single matrix."""
    return {
        f"{name}.weight" if (stacked := tensor.ndim == 3 and name.endswith(FACTORS)) else name:
        tuple(tensor.shape[1:] if stacked else tensor.shape)
        for name, tensor in tensors.items()
    }  # fmt: skip


def named_by_parameter(words: Mapping[str, Any], shapes: Shapes, prefix: str) -> tuple[dict[str, tuple[int, ...]], str]:
    """Return the shapes of a file with the tensors of wrapped parameters named by the parameter, and what is unknown.

    Dimension 0 of a factor A becomes the rank, which the words tell. The second is a parameter that is neither a stack
    of experts nor a layer's weight; empty where there is none.
    """
    wanted = [name for name in words.get("target_parameters") or [] if not is_weight(name)]
    if not wanted:
        return dict(shapes), ""
    if unknown := [name for name in wanted if name.rpartition(".")[2] not in PROJECTIONS]:
        return dict(shapes), unknown[0]
    found = dict(shapes)
    wrapped: dict[str, list[str]] = {}
    for name in shapes:
        holder, factor, _ = name.partition(".lora_A.weight")
        module = re.sub(r"(\.base_layer)+$", "", holder.removeprefix(prefix))
        # A parameter named by its last part alone would be one of any layer: the rows of a stack are its experts'.
        is_stack = holder.endswith(".base_layer") or shapes[name][0] != stored_rank(words, module)
        if factor and is_stack and is_wrapped_parameter(module, wanted):
            wrapped.setdefault(re.sub(r"(\.base_layer)+$", "", holder), []).append(holder)
    for module, holders in wrapped.items():
        names = [name for name in PROJECTIONS if _matches(f"{module.removeprefix(prefix)}.{name}", wanted)]
        if len(names) != len(holders):
            return dict(shapes), f"{module.removeprefix(prefix)} in another order or number"
        # The deepest wrapper has the first parameter.
        for name, holder in zip(names, sorted(holders, key=len, reverse=True), strict=True):
            full = f"{module.removeprefix(prefix)}.{name}"
            _, width = found.pop(f"{holder}.lora_A.weight")
            found.pop(f"{holder}.lora_B.weight", None)
            found[f"{module}.{name}.lora_A.weight"] = (stored_rank(words, full), width)
    return found, ""


def is_wrapped_parameter(module: str, wanted: list[str]) -> bool:
    """Return whether a tensor of this module in a file is the adapter of one of its parameters."""
    module = re.sub(r"(\.base_layer)+$", "", module)
    return any(_matches(f"{module}.{name}", wanted) for name in PROJECTIONS)


def stored_rank(words: Mapping[str, Any], name: str) -> int:
    """Return a parameter's rank by HF's rules: the first key of rank_pattern that matches its name's end counts."""
    patterns = (words.get("rank_pattern") or {}).items()
    rank: int = next((v for key, v in patterns if re.match(rf"(.*\.)?({key})$", name)), words.get("r", 8))
    return rank


def write_parameter_words(layers: Mapping[str, Adapter]) -> dict[str, Any]:
    """Return HF's words for adapters of stacked experts: which parameters, and no dropout, which HF refuses there."""
    names = sorted(name for name, layer in layers.items() if isinstance(layer, LoRAExperts))
    return {"target_parameters": names, "lora_dropout": 0.0} if names else {}


def _matches(name: str, wanted: list[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in wanted)


def _wrapper(name: str, layers: Mapping[str, LoRAExperts]) -> str:
    """Return the name of HF's wrapper for a stack, `base_layer` once for each later one of its module."""
    module, _, own = name.rpartition(".")
    later = [other for other in PROJECTIONS[PROJECTIONS.index(own) + 1 :] if f"{module}.{other}" in layers]
    return module + ".base_layer" * len(later)


def _swapped(model: nn.Module, name: str, layer: LoRAExperts) -> bool:
    """Return whether HF takes the matrices for (out, in) though they are stored (in, out), or the other way round."""
    module = model.get_submodule(name.rpartition(".")[0])
    return layer.base_layer.transposed != bool(getattr(module, "is_transposed", False))
