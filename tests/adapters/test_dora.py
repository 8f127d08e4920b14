"""DoRA against the plain dense formula."""

import pytest
import torch
import torch.nn.functional as F
from adapter_models import wrapped
from torch import Tensor, nn

from lightning_peft.adapters import dora
from lightning_peft.adapters.dora import DoRAEmbedding, DoRALinear, adapted_row_norms
from lightning_peft.kernels.frozen_linear import given
from lightning_peft.kernels.low_rank import add_and_scale
from lightning_peft.quantization.linear import QuantizedLinear
from lightning_peft.quantization.weights import dense_weight


def moved(base_layer: nn.Module, **options: float) -> DoRALinear:
    """Return a layer with A, B and m away from their start."""
    torch.manual_seed(0)
    layer = wrapped(DoRALinear, base_layer, rank=3, alpha=6.0, **options)
    nn.init.normal_(layer.lora_B.weight, std=0.2)
    with torch.no_grad():
        layer.lora_magnitude_vector.mul_(1 + 0.1 * torch.randn_like(layer.lora_magnitude_vector))
    return layer


def dense_weight_of(layer: DoRALinear) -> Tensor:
    """Return m (W + s B A) / |W + s B A| with the norm held constant, written out."""
    direction = dense_weight(layer.base_layer).float() + layer.scaling * layer.lora_B.weight @ layer.lora_A.weight
    norms = torch.linalg.norm(direction.detach(), dim=1, keepdim=True)
    return layer.lora_magnitude_vector[:, None] * direction / norms


def test_worked_example() -> None:
    """W = [3, 4] and B A = [1, 1] make [4, 5] of norm sqrt(41); the magnitude stays 5."""
    layer = wrapped(DoRALinear, nn.Linear(2, 1, bias=False), rank=1, alpha=1.0)
    with torch.no_grad():
        layer.base_layer.weight.copy_(torch.tensor([[3.0, 4.0]]))
        layer.reset_parameters()
        layer.lora_A.weight.fill_(1.0)
        layer.lora_B.weight.fill_(1.0)

    merged = layer.base_layer.weight + layer.delta_weight()

    torch.testing.assert_close(merged, torch.tensor([[5 * 4 / 41**0.5, 5 * 5 / 41**0.5]]))


@pytest.mark.parametrize("rows_at_once", [1, 100, 2**24])
def test_closed_form_norm_is_the_dense_norm(rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dora, "ROWS_AT_ONCE", rows_at_once)
    torch.manual_seed(0)
    W, A, B = torch.randn(40, 30), torch.randn(5, 30), torch.randn(40, 5)

    actual = adapted_row_norms(W, dora.squared_row_norms(W), A, B, 0.7)

    expected = torch.linalg.norm((W + 0.7 * B @ A).double(), dim=1).float()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)


def test_closed_form_norm_of_a_bf16_weight_is_fp32() -> None:
    torch.manual_seed(0)
    W, A, B = torch.randn(64, 512).bfloat16(), torch.randn(8, 512) / 20, torch.randn(64, 8) / 20

    actual = adapted_row_norms(W, dora.squared_row_norms(W), A, B, 2.0)

    expected = torch.linalg.norm(W.double() + 2.0 * (B.double() @ A.double()), dim=1).float()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("with_bias", [False, True])
def test_product_passes_gradcheck(with_bias: bool) -> None:
    torch.manual_seed(0)
    shapes = [(2, 3, 5), (2, 3, 4), (2, 4), (5, 2), (5,)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    bias = torch.randn(5, dtype=torch.float64) if with_bias else None

    def product(base_output: Tensor, *rest: Tensor) -> Tensor:
        return add_and_scale(given(base_output.clone()), *rest, 1.7, bias)

    assert torch.autograd.gradcheck(product, inputs)


@pytest.mark.parametrize("bias", [False, True])
def test_forward_and_gradients_are_those_of_the_dense_weight(bias: bool) -> None:
    layer = moved(nn.Linear(16, 12, bias=bias))
    x = torch.randn(7, 16, requires_grad=True)
    wanted = [x, layer.lora_A.weight, layer.lora_B.weight, layer.lora_magnitude_vector]
    expected = F.linear(x, dense_weight_of(layer), layer.base_layer.bias)

    actual = layer(x)

    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    direction = torch.randn(7, 12)
    torch.testing.assert_close(
        torch.autograd.grad((actual * direction).sum(), wanted),
        torch.autograd.grad((expected * direction).sum(), wanted),
        atol=1e-5,
        rtol=1e-4,
    )


def test_norm_is_of_the_dequantised_weight() -> None:
    layer = moved(QuantizedLinear.from_weight(torch.randn(32, 64)))
    x = torch.randn(5, 64)

    torch.testing.assert_close(layer(x), F.linear(x, dense_weight_of(layer)), atol=1e-4, rtol=1e-4)


def test_dropout_reaches_the_term_of_the_magnitude() -> None:
    layer = moved(nn.Linear(16, 12), dropout=0.5).train()
    x = torch.randn(7, 16)

    torch.manual_seed(9)
    actual = layer(x)

    torch.manual_seed(9)
    dropped = F.dropout(x, 0.5)
    gain = layer.gain()
    plain = dropped @ layer.base_layer.weight.t()
    low_rank = layer.scaling * dropped @ layer.lora_A.weight.t() @ layer.lora_B.weight.t()
    torch.testing.assert_close(actual, layer.base_layer(x) + (gain - 1) * plain + gain * low_rank, atol=1e-5, rtol=1e-4)


def test_zero_row_stays_finite_and_untouched() -> None:
    base_layer = nn.Linear(6, 3)
    with torch.no_grad():
        base_layer.weight[1] = 0
    layer = wrapped(DoRALinear, base_layer, rank=2, alpha=4.0)
    x = torch.randn(4, 6)
    expected = base_layer(x).clone()

    output = layer(x)
    output.sum().backward()

    assert torch.equal(output, expected)
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)


def test_gain_that_bf16_rounds_to_one_still_acts() -> None:
    base_layer = nn.Linear(64, 64, bias=False).bfloat16()
    layer = wrapped(DoRALinear, base_layer, rank=2, alpha=4.0)
    assert torch.tensor(1.003).bfloat16() == 1
    with torch.no_grad():
        layer.lora_magnitude_vector.mul_(1.003)
    x = torch.randn(256, 64).bfloat16()

    plain, output = base_layer(x).double(), layer(x).double()

    # Each output moves by a whole bf16 step or not at all, so only their mean follows the gain.
    mean_gain = (output * plain).sum() / (plain * plain).sum()
    assert abs(mean_gain - 1.003) < 0.0015


def test_norm_is_taken_once_while_weights_stand_still(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = moved(nn.Linear(16, 12)).eval()
    calls: list[int] = []
    plain = DoRALinear.weight_norms
    monkeypatch.setattr(DoRALinear, "weight_norms", lambda self: calls.append(1) or plain(self))
    with torch.no_grad():
        first = layer(torch.ones(1, 16))
        layer(torch.ones(1, 16))
        assert len(calls) == 1
        layer.lora_B.weight.mul_(2)
        second = layer(torch.ones(1, 16))

    assert len(calls) == 2 and not torch.equal(first, second)
    torch.testing.assert_close(second, F.linear(torch.ones(1, 16), dense_weight_of(layer), layer.base_layer.bias))


def test_embedding_norms_are_per_dimension() -> None:
    torch.manual_seed(0)
    layer = wrapped(DoRAEmbedding, nn.Embedding(20, 6), rank=2, alpha=4.0)
    nn.init.normal_(layer.lora_embedding_A, std=0.3)
    with torch.no_grad():
        layer.lora_magnitude_vector.mul_(1.1)
    direction = layer.base_layer.weight + 2 * (layer.lora_embedding_B @ layer.lora_embedding_A).t()
    weight = layer.lora_magnitude_vector * direction / torch.linalg.norm(direction, dim=0)

    torch.testing.assert_close(layer(torch.arange(20)), weight, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.base_layer.weight + layer.delta_weight(), weight, atol=1e-5, rtol=1e-5)
