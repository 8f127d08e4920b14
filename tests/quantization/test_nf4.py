import copy

import bitsandbytes.functional as bnb
import pytest
import reference
import torch
from torch import Tensor, nn

from lightning_peft.kernels.codes import Codes, dequantize, dynamic_map, quantize
from lightning_peft.quantization.linear import QuantizedLinear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_weight(rows: int = 48, columns: int = 256, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [32, 64, 256])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codes_equal_the_reference_bit_for_bit(kind, block_size, dtype):
    weight = random_weight(dtype=dtype)
    packed, absmax = reference.quantize(weight, kind, block_size)
    codes = quantize(weight, kind, block_size, double_quantization=False)
    assert torch.equal(codes.weight, packed)
    assert torch.equal(codes.absmax, absmax)
    expected = reference.dequantize(packed, absmax, kind, block_size, dtype)
    assert torch.equal(dequantize(codes, kind, block_size, dtype), expected)


def test_zero_block_and_ties_equal_the_reference():
    weight = torch.zeros(2, 64)
    edges = (reference.NF4_LEVELS[1:] + reference.NF4_LEVELS[:-1]) / 2
    weight[1, :15], weight[1, 15] = edges, 1.0
    packed, absmax = reference.quantize(weight, "nf4", 64)
    codes = quantize(weight, "nf4", 64, double_quantization=False)
    assert torch.equal(codes.weight, packed)
    assert torch.equal(codes.absmax, absmax)
    assert codes.absmax[0].item() == 0
    assert not dequantize(codes, "nf4", 64, torch.float32)[0].any()


@pytest.mark.parametrize("double_quantization", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_equal_bitsandbytes_bit_for_bit(dtype, kind, double_quantization):
    weight = random_weight(dtype=dtype)
    packed, state = bnb.quantize_4bit(
        weight, blocksize=64, compress_statistics=double_quantization, quant_type=kind, quant_storage=torch.uint8
    )
    codes = quantize(weight, kind, 64, double_quantization)
    assert torch.equal(codes.weight.view(-1, 1), packed)
    assert torch.equal(codes.absmax.flatten(), state.absmax)
    if double_quantization:
        assert torch.equal(codes.absmax_scale, state.state2.absmax)
        assert torch.equal(codes.absmax_offset, state.offset)
    assert torch.equal(dequantize(codes, kind, 64, dtype), bnb.dequantize_4bit(packed, state))


def test_dynamic_map_is_the_decimal_float_of_the_paper():
    assert torch.equal(dynamic_map(torch.device("cpu")), reference.dynamic_levels())


def test_double_quantization_equals_the_reference():
    weight = random_weight(64, 1024)
    absmax = quantize(weight, "nf4", 64, double_quantization=False).absmax.flatten()
    codes = quantize(weight, "nf4", 64, double_quantization=True)
    levels, residual = reference.dynamic_levels(), absmax - absmax.mean()
    indices, scales = reference.blockwise_codes(residual, levels, 256)
    assert torch.equal(codes.absmax_offset, absmax.mean())
    assert torch.equal(codes.absmax_scale, scales)
    # The CPU kernel finds the level by a table of 2^16 cells, so within a cell of a midpoint either neighbour may come.
    stored = codes.absmax.flatten().long()
    scaled = residual / scales.repeat_interleave(256)
    beyond = (scaled - levels[stored]).abs() - (scaled - levels[indices]).abs()
    assert beyond.max() <= 2 / 2**16
    assert (stored != indices).float().mean() < 0.01


@pytest.mark.parametrize(("double_quantization", "expected"), [(False, 4.5), (True, 4 + 8 / 64 + 32 / (64 * 256))])
def test_bits_per_weight(double_quantization, expected):
    codes = quantize(random_weight(256, 1024), "nf4", 64, double_quantization)
    tensors = [tensor for tensor in codes[:3] if tensor is not None]
    assert sum(tensor.nbytes for tensor in tensors) * 8 / (256 * 1024) == expected


@pytest.mark.parametrize("double_quantization", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_gradients_equal_a_dense_layer(dtype, double_quantization):
    layer = QuantizedLinear.from_weight(
        random_weight(dtype=dtype),
        nn.Parameter(random_weight(1, 48, dtype)[0]),
        double_quantization=double_quantization,
    )
    x = random_weight(6, 256, dtype, seed=1).view(2, 3, 256).requires_grad_()
    dense = layer.dequantize(dtype)
    grad = random_weight(6, 48, dtype, seed=2).view(2, 3, 48)
    expected = torch.autograd.grad(nn.functional.linear(x, dense, layer.bias), [x, layer.bias], grad)
    actual = torch.autograd.grad(layer(x), [x, layer.bias], grad)
    assert torch.equal(layer(x), nn.functional.linear(x, dense, layer.bias))
    # Rows summed in another order: two units of the dtype on values up to about 10.
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-1}
    torch.testing.assert_close(actual, expected, **tolerance)


def test_gradient_matches_finite_differences():
    layer = QuantizedLinear.from_weight(random_weight(8, 64), nn.Parameter(torch.randn(8, dtype=torch.float64)))
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def test_dense_weight_is_never_saved_for_the_backward():
    layer = QuantizedLinear.from_weight(random_weight(512, 1024))
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(2, 1024, requires_grad=True))
    assert saved
    assert sum(tensor.nbytes for tensor in saved) <= sum(tensor.nbytes for tensor in layer.codes)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own, on any Function
def test_compiled_layers_keep_no_dense_weight():
    model = nn.Sequential(
        QuantizedLinear.from_weight(random_weight(256, 256)), QuantizedLinear.from_weight(random_weight(256, 256))
    )
    x = torch.randn(4, 256, requires_grad=True)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    compiled = torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = compiled(x)
    (grad,) = torch.autograd.grad(output.sum(), x)
    assert torch.equal(output, model(x))
    assert torch.equal(grad, torch.autograd.grad(model(x).sum(), x)[0])
    assert saved
    assert all(tensor.numel() < 256 * 256 or tensor.dtype == torch.uint8 for tensor in saved)


def test_autocast_computes_in_its_dtype():
    layer = QuantizedLinear.from_weight(random_weight())
    x = random_weight(3, 256)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
        expected = nn.functional.linear(x, layer.dequantize(torch.float32))
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected)


@pytest.mark.parametrize("double_quantization", [True, False])
def test_cast_leaves_the_statistics_alone(double_quantization):
    layer = QuantizedLinear.from_weight(
        random_weight(), nn.Parameter(torch.ones(48)), double_quantization=double_quantization
    )
    before = copy.deepcopy(layer.codes)
    nn.Sequential(layer).to(torch.bfloat16)
    for old, new in zip(before, layer.codes, strict=True):
        assert (old is None and new is None) or (old.dtype == new.dtype and torch.equal(old, new))
    assert layer.bias.dtype == layer.dtype == layer.dequantize().dtype == torch.bfloat16
    assert torch.equal(layer.dequantize(), dequantize(before, "nf4", 64, torch.bfloat16))


def test_meta_layer_has_the_shapes_of_a_filled_one():
    empty = QuantizedLinear(256, 48, bias=True)
    filled = QuantizedLinear.from_weight(random_weight(), nn.Parameter(torch.zeros(48)))
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    shapes = [{name: (t.shape, t.dtype) for name, t in layer.state_dict().items()} for layer in (empty, filled)]
    assert shapes[0] == shapes[1]
    empty.load_dense_(random_weight())
    assert torch.equal(empty.dequantize(), filled.dequantize())


def test_state_dict_round_trip_is_exact():
    layer = QuantizedLinear.from_weight(random_weight())
    other = QuantizedLinear(256, 48, device="cpu")
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.dequantize(), layer.dequantize())


def test_only_the_bias_can_train():
    layer = QuantizedLinear.from_weight(random_weight(), nn.Parameter(torch.zeros(48)))
    assert [name for name, parameter in layer.named_parameters() if parameter.requires_grad] == ["bias"]


def test_block_over_two_rows_is_refused():
    with pytest.raises(ValueError, match=r"block_size=64: in_features 96 .* \(block size 32 would fit\)"):
        QuantizedLinear(96, 8)
    with pytest.raises(ValueError, match="in_features 40 is no multiple of block size 64$"):
        quantize(torch.zeros(8, 40))


def test_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"weight of shape \(4, 64\) for a layer of shape \(8, 64\)"):
        QuantizedLinear(64, 8).load_dense_(torch.zeros(4, 64))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_dequantises_to_the_same_bits(dtype, kind):
    codes = quantize(random_weight(dtype=dtype), kind, 64)
    on_device = Codes(*(None if tensor is None else tensor.cuda() for tensor in codes))
    expected = dequantize(codes, kind, 64, dtype)
    assert torch.equal(dequantize(on_device, kind, 64, dtype).cpu(), expected)
