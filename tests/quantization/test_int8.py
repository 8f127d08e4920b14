"""8-bit frozen layers: the codes of bitsandbytes, and training against the dequantised weight."""

import bitsandbytes  # noqa: F401  registers the operator
import pytest
import torch
from torch import nn

from lightning_peft.adapters.inject import inject_adapters
from lightning_peft.adapters.lora import LoRAConfig
from lightning_peft.adapters.merge import merge_adapters
from lightning_peft.checkpoint.merge_config import MergeBase, MergeConfig
from lightning_peft.checkpoint.merged import MergeError, merge
from lightning_peft.models.tiny import tiny_model, tiny_tokenizer
from lightning_peft.quantization.config import Kind, QuantizationConfig
from lightning_peft.quantization.linear import QuantizedLinear
from lightning_peft.quantization.quantize import bits_per_parameter, quantize_linears, weights_fingerprint
from lightning_peft.quantization.weights import dense_weight, is_quantized

INT8 = QuantizationConfig(kind=Kind.int8, double_quantization=False)
DTYPES = [torch.float32, torch.bfloat16]


def weight_of(rows: int = 96, columns: int = 60) -> torch.Tensor:
    """Return a weight: 60 columns are no multiple of any 4-bit block; a row of zeros has no scale."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    return weight


def test_codes_and_scales_are_those_of_bitsandbytes() -> None:
    weight = weight_of()[4:]  # a row of zeros makes theirs divide by zero
    levels, scales, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(weight)

    codes = QuantizedLinear.from_weight(weight, kind="int8").codes

    assert torch.equal(codes.weight.view(torch.int8), levels)
    assert torch.equal(codes.absmax.flatten(), scales)


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_backward_are_those_of_the_dequantised_weight(dtype: torch.dtype) -> None:
    layer = QuantizedLinear.from_weight(weight_of().to(dtype), nn.Parameter(torch.randn(96)), kind="int8")
    dense = layer.dequantize(dtype)
    x, direction = torch.randn(5, 60).to(dtype).requires_grad_(), torch.randn(5, 96).to(dtype)

    actual = layer(x)
    (grad,) = torch.autograd.grad(actual, x, direction)

    expected = nn.functional.linear(x, dense, layer.bias.to(dtype))
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, x, direction)[0])
    # Half a step of 1 / 127 of the largest weight of the row, and bf16's own rounding.
    step = weight_of().abs().amax(1, keepdim=True) * (0.5 / 127 + (0 if dtype == torch.float32 else 2**-7))
    assert bool(((dense.float() - weight_of()).abs() <= step * 1.001).all())


def test_scales_stay_fp32_when_the_model_is_cast() -> None:
    layer = QuantizedLinear.from_weight(weight_of(), kind="int8").to(torch.bfloat16)

    assert layer.absmax.dtype == torch.float32 and layer.weight.dtype == torch.uint8
    assert layer.dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:.*should not be instantiated.*:DeprecationWarning")
def test_compiled_layer_gives_the_same_gradient() -> None:
    layer = QuantizedLinear.from_weight(weight_of(), kind="int8")
    x = torch.randn(5, 60, requires_grad=True)
    expected = torch.autograd.grad(layer(x).square().sum(), x)

    actual = torch.autograd.grad(torch.compile(layer, backend="aot_eager")(x).square().sum(), x)

    torch.testing.assert_close(actual, expected)


def test_model_trains_and_merges_on_its_dequantised_weights() -> None:
    model = tiny_model().eval()
    quantize_linears(model, INT8)
    before = weights_fingerprint(model)
    inject_adapters(model, LoRAConfig(rank=4))
    ids = torch.arange(24)[None]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] and weights_fingerprint(model) == before
    # 8 bits a weight and 32 a row of 64, 128 or 256 columns.
    assert 8 + 32 / 256 < bits_per_parameter(model) < 8 + 32 / 64 + 1e-9

    expected = model(input_ids=ids).logits.detach()
    merge_adapters(model)
    assert not any(is_quantized(module) for module in model.modules())
    torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=2e-5, rtol=1e-4)


def test_error_is_far_below_that_of_four_bits() -> None:
    weight = weight_of(96, 64)
    error = {
        kind: float((dense_weight(QuantizedLinear.from_weight(weight, kind=kind)) - weight).norm())
        for kind in ("nf4", "int8")
    }

    assert error["int8"] < error["nf4"] / 8


def test_requantised_merge_is_refused(tmp_path) -> None:
    model = tiny_model()
    quantize_linears(model, INT8)
    inject_adapters(model, LoRAConfig(rank=4))

    with pytest.raises(MergeError, match="merge.base=requantised writes 4-bit layers, this base is int8"):
        merge(
            model, tiny_tokenizer(), tmp_path / "out", [torch.arange(8)[None]], MergeConfig(base=MergeBase.requantised)
        )
