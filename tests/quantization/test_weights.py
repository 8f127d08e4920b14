import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_peft.quantization.linear import QuantizedLinear
from lightning_peft.quantization.weights import dense_weight, is_quantized, linear_shape, write_weight

LAYERS = {
    "linear": lambda: nn.Linear(64, 24),
    "conv1d": lambda: Conv1D(24, 64),
    "quantised": lambda: QuantizedLinear.from_weight(torch.randn(24, 64)),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
def test_dense_weight_gives_the_layers_output(make):
    layer, x = make(), torch.randn(5, 64)
    weight = dense_weight(layer)
    assert weight.shape == linear_shape(layer) == (24, 64)
    assert not weight.requires_grad
    bias = layer.bias if layer.bias is not None else 0
    torch.testing.assert_close(x @ weight.t() + bias, layer(x))


def test_embedding_weight_is_ids_by_dim():
    layer = nn.Embedding(10, 4)
    assert linear_shape(layer) == (10, 4)
    assert torch.equal(dense_weight(layer), layer.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [LAYERS["linear"], LAYERS["conv1d"], lambda: nn.Embedding(24, 64)])
def test_write_weight_is_read_back_in_the_layers_dtype(make, dtype):
    layer = make().to(dtype)
    storage, weight = layer.weight.data_ptr(), torch.randn(24, 64)
    write_weight(layer, weight)
    assert torch.equal(dense_weight(layer), weight.to(dtype))
    assert layer.weight.data_ptr() == storage


def test_quantised_weight_is_written_on_request_only():
    layer, weight = LAYERS["quantised"](), torch.randn(24, 64)
    with pytest.raises(RuntimeError, match="nf4 layer cannot hold a merged weight exactly"):
        write_weight(layer, weight)
    write_weight(layer, weight, requantize=True)
    assert torch.equal(dense_weight(layer), QuantizedLinear.from_weight(weight).dequantize())


def test_write_weight_refuses_another_shape():
    with pytest.raises(ValueError, match=r"weight of shape \(64, 24\) for a layer of shape \(24, 64\)"):
        write_weight(Conv1D(24, 64), torch.zeros(64, 24))


def test_a_layer_without_linear_weight_is_refused():
    with pytest.raises(TypeError, match="LayerNorm has no linear weight"):
        dense_weight(nn.LayerNorm(8))


def test_is_quantized_tells_codes_from_weights():
    assert [is_quantized(make()) for make in LAYERS.values()] == [False, False, True]
