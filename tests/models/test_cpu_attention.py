"""Attention by groups and strips against the formula, at lengths of several strips."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lightning_peft.models import sample_groups
from lightning_peft.models.attention import varlen_attention
from lightning_peft.models.sample_groups import MAX_STRIP, MIN_STRIP

WIDTH = 2 * MAX_STRIP + 44


def inputs(dtype: torch.dtype, rows: int = 2, spread: float = 1.0) -> list[Tensor]:
    """query, key and value with 6, 2 and 2 heads of 16, laid out as models do, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(rows, WIDTH, heads, 16, generator=generator) for heads in (6, 2, 2, 6)]
    drawn[0] *= spread
    return [*(x.to(dtype).transpose(1, 2) for x in drawn[:3]), drawn[3].to(dtype)]


def by_formula(query: Tensor, key: Tensor, value: Tensor, bounds: list[int], scaling: float, window: int) -> Tensor:
    """Attention with the mask of all tokens written out, (rows, WIDTH, heads, D)."""
    sample = torch.bucketize(torch.arange(query.shape[0] * WIDTH), torch.tensor(bounds[1:]), right=True)
    sample = sample.view(query.shape[0], 1, WIDTH)
    distance = torch.arange(WIDTH)[:, None] - torch.arange(WIDTH)
    seen = (distance >= 0) & (distance < window) & (sample.unflatten(2, (WIDTH, 1)) == sample.unflatten(2, (1, WIDTH)))
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = (query @ key.mT * scaling).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


def errors(
    dtype: torch.dtype, bounds: list[int], scaling: float, window: int | None, spread: float = 1.0
) -> list[float]:
    """Output's and gradients' distance from the formula in fp64, as a share of its norm."""
    *drawn, grad = inputs(dtype, spread=spread)
    ours, exact = ([x.detach().to(kind).requires_grad_() for x in drawn] for kind in (dtype, torch.float64))
    output = varlen_attention(*ours, torch.tensor(bounds, dtype=torch.int32), WIDTH, scaling, window=window)
    expected = by_formula(*exact, bounds, scaling, window or WIDTH)
    output.backward(grad)
    expected.backward(grad.double())
    pairs = [(output.detach(), expected.detach()), *((a.grad, b.grad) for a, b in zip(ours, exact, strict=True))]
    return [float((a.double() - b).norm() / b.norm()) for a, b in pairs]


PACKED = [0, 7, 100, 250, WIDTH, WIDTH + 140, 2 * WIDTH]


@pytest.mark.parametrize("scaling", [0.25, 0.3])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("bounds", [PACKED, [0, WIDTH, 2 * WIDTH]], ids=["packed", "a sample a row"])
def test_several_strips_equal_the_formula(bounds: list[int], window: int | None, scaling: float) -> None:
    assert max(errors(torch.float32, bounds, scaling, window)) < 2e-6  # fp32 rounding


@pytest.mark.parametrize("spread", [1.0, 20.0])
def test_bf16_is_off_by_its_rounding_whatever_the_scores(spread: float) -> None:
    # Half a unit in bf16's last place is 2^-9 = 0.002; scores of 80 rounded to bf16 would alone be off by 0.25.
    output, *gradients = errors(torch.bfloat16, PACKED, 0.3, None, spread)
    assert output < 0.003 and max(gradients) < 0.012


@pytest.fixture
def small_strips(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """So little memory for scores that every strip is of the shortest."""
    monkeypatch.setattr(sample_groups, "STRIP_BYTES", 4 * 6 * WIDTH * MIN_STRIP)
    sample_groups._arrange.cache_clear()
    yield
    sample_groups._arrange.cache_clear()


@pytest.mark.usefixtures("small_strips")
def test_shortest_strips_equal_the_formula() -> None:
    assert max(errors(torch.float32, PACKED, 0.25, None)) < 2e-6


def test_padding_of_a_group_reaches_no_gradient() -> None:
    bounds = [0, 40, 78, 114, 148, 180, 212, 241, 260, WIDTH, 2 * WIDTH]
    arrangement = sample_groups.arrange(torch.tensor(bounds), 2, WIDTH, 6, None)
    assert arrangement.num_slots > 2 * WIDTH
    assert max(errors(torch.float32, bounds, 0.25, None)) < 2e-6
    assert max(errors(torch.bfloat16, bounds, 0.25, None)) < 0.012


@pytest.mark.parametrize(("heads", "key_heads", "head_dim"), [(2, 2, 16), (4, 1, 16), (4, 2, 80)])
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_any_heads_under_any_default_dtype(heads: int, key_heads: int, head_dim: int, default: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(2, WIDTH, n, head_dim, generator=generator) for n in (heads, key_heads, key_heads)]
    ours, exact = ([x.detach().to(kind).requires_grad_() for x in drawn] for kind in (torch.float32, torch.float64))
    bounds = torch.tensor(PACKED, dtype=torch.int32)
    torch.set_default_dtype(default)
    try:
        output = varlen_attention(*(x.transpose(1, 2) for x in ours), bounds, WIDTH, 0.3)
        output.square().sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    expected = by_formula(*(x.transpose(1, 2) for x in exact), PACKED, 0.3, WIDTH)
    expected.square().sum().backward()
    for actual, wanted in [
        (output.detach(), expected.detach()),
        *((a.grad, b.grad) for a, b in zip(ours, exact, strict=True)),
    ]:
        assert float((actual.double() - wanted).norm() / wanted.norm()) < 3e-6  # fp32 rounding
