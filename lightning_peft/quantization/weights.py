"""The dense view of a layer's weight, whatever form it is stored in."""

import inspect
import math
import re
from collections import Counter
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_peft.quantization.experts import ExpertLinear, QuantizedExperts
from lightning_peft.quantization.linear import CodedWeight, QuantizedLinear


def is_quantized(layer: nn.Module) -> bool:
    """Return whether the layer's weight is stored as codes, so that it cannot hold an arbitrary dense weight."""
    return isinstance(layer, CodedWeight)


def is_transposed(layer: nn.Module) -> bool:
    """Return whether the layer's own weight has its inputs first, as GPT-2's has."""
    return isinstance(layer, Conv1D)


@cache
def acts_as_linear(kind: type[nn.Linear]) -> bool:
    """Return whether a class of linear layers computes the plain product: not a router's choice, nor one of groups."""
    if kind.forward is nn.Linear.forward:
        return True
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            layer = kind(6, 4)
            x = torch.randn(2, 3, 6, dtype=layer.weight.dtype)
            output = layer(x)
        except Exception:  # whatever a class raises that is made or called in another way
            return False
        return isinstance(output, Tensor) and torch.allclose(output, F.linear(x, layer.weight, layer.bias), atol=1e-5)


def is_linear(layer: nn.Module) -> bool:
    """Return whether a layer is dense and computes the product of its weight."""
    return isinstance(layer, Conv1D) or isinstance(layer, nn.Linear) and acts_as_linear(type(layer))  # type: ignore[arg-type]


def reads_weight(parent: nn.Module, leaf: str) -> bool:
    """Return whether a module's code multiplies with the weight of its layer `leaf` itself, as Mamba's mixer does."""
    return _code_has(parent, rf"self\.{leaf}\.weight(?!\.(device|dtype|shape))")


def needs_dense_weight(parent: nn.Module, leaf: str) -> bool:
    """Return whether a module's code takes its layer's weight for a dense one, which codes are not.

    It multiplies with the weight itself, or casts what it gives the layer to the weight's dtype, as the indexer of
    DeepSeek V3.2 does: that of codes would make whole numbers of the activations.
    """
    return reads_weight(parent, leaf) or _code_has(parent, rf"\.to\((dtype=)?self\.{leaf}\.weight\.dtype")


def never_calls(parent: nn.Module, leaf: str) -> bool:
    """Return whether a module's code multiplies with its layer's weight on every device, as others do only on some."""
    return _code_has(parent, rf"self\.{leaf}\.weight @")


def _code_has(parent: nn.Module, pattern: str) -> bool:
    methods = [method for method in vars(type(parent)).values() if inspect.isfunction(method)]
    return any(re.search(pattern, _source(method)) for method in methods)


@cache
def _source(method: Any) -> str:
    try:
        return inspect.getsource(method)
    except (OSError, TypeError):  # it was made at run time
        return ""


def linear_shape(layer: nn.Module) -> tuple[int, int]:
    """Return (out_features, in_features) of a linear layer; (num_embeddings, embedding_dim) of an embedding."""
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    if isinstance(layer, nn.Linear | QuantizedLinear):
        return layer.out_features, layer.in_features
    raise TypeError(
        f"{type(layer).__name__} has no linear weight: expected Linear, Embedding, Conv1D or QuantizedLinear"
    )


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """Return `linear_shape`, and (experts, out_features, in_features) of a stack of matrices."""
    return layer.shape if isinstance(layer, ExpertLinear | QuantizedExperts) else linear_shape(layer)


def dense_weight(layer: nn.Module) -> Tensor:
    """Return the detached weight in the shape `weight_shape` gives.

    A dense layer's is its own storage, in its dtype (Conv1D: a transposed view): read it, do not write to it. A
    quantised one is dequantised afresh in the dtype the layer computes in, the weight its adapters trained against.
    """
    if isinstance(layer, CodedWeight):
        return layer.dequantize()
    if isinstance(layer, ExpertLinear):
        return layer.matrices()
    linear_shape(layer)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach().t() if isinstance(layer, Conv1D) else weight.detach()


def dense_dtype(layer: nn.Module) -> torch.dtype:
    """Return the dtype of `dense_weight(layer)`."""
    if isinstance(layer, CodedWeight):
        return layer.dtype
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.dtype


def computing_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of a model's activations: that of most of the weights that do not train.

    `model.dtype` is the first weight's, which is fp32 where an embedding trains or is adapted.
    """
    sizes: Counter[torch.dtype] = Counter()
    for module in model.modules():
        if isinstance(module, CodedWeight):
            sizes[module.dtype] += math.prod(module.shape)
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point() and not parameter.requires_grad:
                sizes[parameter.dtype] += parameter.numel()
    if not sizes:  # all of it trains
        return next(p.dtype for p in model.parameters() if p.is_floating_point())
    return sizes.most_common(1)[0][0]


@torch.no_grad()
def write_weight(layer: nn.Module, weight: Tensor, requantize: bool = False) -> None:
    """Put a weight of shape `weight_shape(layer)` into the layer, cast once to what the layer stores.

    Codes cannot hold it exactly: a quantised layer raises RuntimeError unless `requantize` asks for the nearest codes.
    """
    if weight.shape != weight_shape(layer):
        raise ValueError(f"weight of shape {tuple(weight.shape)} for a layer of shape {weight_shape(layer)}")
    if isinstance(layer, CodedWeight):
        if not requantize:
            raise RuntimeError(
                f"a {layer.kind} layer cannot hold a merged weight exactly: "
                "replace it by dequantized_layer(layer) first, or pass requantize=True"
            )
        layer.load_dense_(weight)
        return
    stored = layer.weight
    assert isinstance(stored, Tensor)
    is_turned = isinstance(layer, Conv1D) or (isinstance(layer, ExpertLinear) and layer.transposed)
    stored.copy_(weight.mT if is_turned else weight)
