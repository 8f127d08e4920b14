"""The dense view of a layer's weight, whatever form it is stored in."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_peft.quantization.linear import QuantizedLinear


def is_quantized(layer: nn.Module) -> bool:
    """Return whether the layer's weight is stored as codes, so that it cannot hold an arbitrary dense weight."""
    return isinstance(layer, QuantizedLinear)


def linear_shape(layer: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a linear layer; (num_embeddings, embedding_dim) of an embedding."""
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    if isinstance(layer, nn.Linear | QuantizedLinear):
        return layer.out_features, layer.in_features
    raise TypeError(
        f"{type(layer).__name__} has no linear weight: expected Linear, Embedding, Conv1D or QuantizedLinear"
    )


def dense_weight(layer: nn.Module) -> Tensor:
    """Return the detached weight in the shape `linear_shape` gives.

    A dense layer's is its own storage, in its dtype (Conv1D: a transposed view): read it, do not write to it. A
    quantised one is dequantised afresh in the dtype the layer computes in, the weight its adapters trained against.
    """
    if isinstance(layer, QuantizedLinear):
        return layer.dequantize()
    linear_shape(layer)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach().t() if isinstance(layer, Conv1D) else weight.detach()


@torch.no_grad()
def write_weight(layer: nn.Module, weight: Tensor, requantize: bool = False) -> None:
    """Put a weight of shape `linear_shape(layer)` into the layer, cast once to what the layer stores.

    Codes cannot hold it exactly: a quantised layer raises RuntimeError unless `requantize` asks for the nearest codes.
    """
    if weight.shape != linear_shape(layer):
        raise ValueError(f"weight of shape {tuple(weight.shape)} for a layer of shape {linear_shape(layer)}")
    if isinstance(layer, QuantizedLinear):
        if not requantize:
            raise RuntimeError(
                f"a {layer.kind} layer cannot hold a merged weight exactly: "
                "replace it by dequantized_linear(layer) first, or pass requantize=True"
            )
        layer.load_dense_(weight)
        return
    stored = layer.weight
    assert isinstance(stored, Tensor)
    stored.copy_(weight.t() if isinstance(layer, Conv1D) else weight)
