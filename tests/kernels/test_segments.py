"""Several changes beside one layer: the rows of each are what its change alone gives, gradients included."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_peft.kernels import products
from lightning_peft.kernels.frozen_linear import Base, given
from lightning_peft.kernels.low_rank import add_low_rank
from lightning_peft.kernels.native.library import library
from lightning_peft.kernels.segments import RandomState, Segment, add_segments
from lightning_peft.quantization.frozen_base import frozen_base
from lightning_peft.quantization.linear import QuantizedLinear

SEGMENTS = [Segment(0, 3, 2.0), Segment(4, 9, 0.5), Segment(9, 10, 3.0)]
"""Row 3 and those from 10 on are nobody's."""
FORMS = ["dense", "dense with bias", "nf4 with bias", "int8", "given"]


def layer_of(form: str, dtype: torch.dtype, in_features: int = 64, out_features: int = 32) -> nn.Module:
    torch.manual_seed(0)
    if form == "given":
        base: nn.Module = Conv1D(out_features, in_features).to(dtype)  # a layer that no kernel knows
    else:
        base = nn.Linear(in_features, out_features, bias="bias" in form, dtype=dtype)
    base.requires_grad_(False)
    if form.split()[0] in ("nf4", "int8"):
        return QuantizedLinear.from_weight(base.weight.data, base.bias, kind=form.split()[0])
    return base


def base_of(layer: nn.Module, x: Tensor) -> Base:
    return frozen_base(layer, x) or given(layer(x))


def factors_of(segments: list[Segment], in_features: int = 64, out_features: int = 32) -> list[tuple[Tensor, Tensor]]:
    return [
        (
            torch.randn(2 + 3 * number, in_features, requires_grad=True),
            torch.randn(out_features, 2 + 3 * number, requires_grad=True),
        )
        for number in range(len(segments))
    ]


def results(output: Tensor, x: Tensor, factors: Any, direction: Tensor) -> list[Tensor]:
    return [output, *torch.autograd.grad((output * direction).sum(), [x, *factors])]


def assert_each_as_alone(
    form: str, dtype: torch.dtype, segments: list[Segment], rows: int, share: float = 3e-6
) -> None:
    layer = layer_of(form, dtype)
    x = torch.randn(1, rows, 64, dtype=dtype, requires_grad=True)
    factors, direction = factors_of(segments), torch.randn(1, rows, 32, dtype=dtype)
    start = torch.get_rng_state()
    moved = [segment._replace(random=RandomState(start) if segment.dropout else None) for segment in segments]
    flat = [factor for pair in factors for factor in pair]
    output, grad_x, *grads = results(add_segments(base_of(layer, x), x, moved, factors), x, flat, direction)

    for number, segment in enumerate(segments):
        own = x.detach()[:, segment.rows].requires_grad_()
        torch.set_rng_state(start)
        alone = add_low_rank(base_of(layer, own), own, *factors[number], segment.scaling, segment.dropout)
        expected = results(alone, own, factors[number], direction[:, segment.rows])
        actual = [output[:, segment.rows], grad_x[:, segment.rows], *grads[2 * number : 2 * number + 2]]
        for left, right in zip(actual, expected, strict=True):
            assert left.dtype == right.dtype
            limit = share * float(right.detach().abs().max())
            torch.testing.assert_close(left, right, rtol=0, atol=limit)
    for row in set(range(rows)) - {row for s in segments for row in range(s.start, s.stop)}:
        expected_row = layer(x)[:, row]
        torch.testing.assert_close(output[:, row], expected_row, rtol=0, atol=share * 3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_each_segment_is_its_change_alone(form: str, dropout: float) -> None:
    segments = [segment._replace(dropout=dropout * (number != 1)) for number, segment in enumerate(SEGMENTS)]
    assert_each_as_alone(form, torch.float32, segments, 12)


@pytest.fixture
def kernel_or_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute by the compiled kernel where a processor has it, or by what the kernel is tested against."""
    monkeypatch.setattr(products, "kernels_are_fastest", lambda: True)
    if library() is not None:
        return

    def by_torch(*operands: Any) -> None:
        *given, transposed, into = operands
        rows, weight, inner, factor, gain, bias = given
        with monkeypatch.context() as patch:
            patch.setattr(products, "kernels_are_fastest", lambda: False)
            into.copy_(torch.ops.lightning_peft.low_rank_sum(rows, weight, inner, factor, gain, bias, transposed))

    monkeypatch.setattr(products, "takes_gradients", lambda *operands: False)
    monkeypatch.setattr(products, "sum_by_kernel", by_torch)


@pytest.mark.usefixtures("kernel_or_its_formula")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [(96, 64, 64), (200, 200, 256), (8, 8, 8)], ids=["one", "each", "torch"])
def test_each_segment_is_its_change_alone_in_bf16(form: str, rows: tuple[int, int, int]) -> None:
    """The kernel computes it in one product, in a product each, and torch does; a unit of bf16's last place."""
    bounds = torch.tensor([0, *rows]).cumsum(0).tolist()
    segments = [Segment(bounds[i], bounds[i + 1], 0.5) for i in range(3)]
    assert_each_as_alone(form, torch.bfloat16, segments, bounds[-1], share=2**-7)


@pytest.mark.usefixtures("kernel_or_its_formula")
@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 12), (torch.bfloat16, 12), (torch.bfloat16, 300)])
@pytest.mark.parametrize("broken", ["A", "B", "x"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_with_its_change(dtype: torch.dtype, rows: int, broken: str, value: float) -> None:
    layer = layer_of("dense", dtype)
    segments = [Segment(0, 3, 2.0), Segment(3, rows, 0.5)]
    x = torch.randn(rows, 64, dtype=dtype)
    factors = factors_of(segments)
    with torch.no_grad():
        {"A": factors[0][0][0], "B": factors[0][1][0], "x": x[0]}[broken].fill_(value)
    x.requires_grad_()
    output = add_segments(base_of(layer, x), x, segments, factors)
    grad_x, *grads = torch.autograd.grad(output.sum(), [x, *(factor for pair in factors for factor in pair)])
    assert output[3:].isfinite().all() and grad_x[3:].isfinite().all()
    assert all(grad.isfinite().all() for grad in grads[2:])
    assert not output[:3].isfinite().all()


def test_rows_of_nobody_are_the_plain_layer_to_the_bit() -> None:
    layer = layer_of("dense with bias", torch.bfloat16)
    x = torch.randn(12, 64, dtype=torch.bfloat16)
    output = add_segments(base_of(layer, x), x, SEGMENTS, factors_of(SEGMENTS))
    assert torch.equal(output[[3, 10, 11]], layer(x)[[3, 10, 11]])
