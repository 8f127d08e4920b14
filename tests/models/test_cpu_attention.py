"""Attention by strips against the formula, at lengths of several strips."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lightning_peft.models import cpu_attention
from lightning_peft.models.attention import varlen_attention
from lightning_peft.models.cpu_attention import MAX_STRIP, MIN_STRIP, cut_strips, strip_length, strips_of_rows

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
    key, value = (x.repeat_interleave(3, 1) for x in (key, value))
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


def test_strips_get_shorter_where_their_scores_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert strip_length(heads=9, keys=512) == MAX_STRIP
    assert strip_length(heads=32, keys=4096) == 64
    assert strip_length(heads=64, keys=10**6) == MIN_STRIP
    monkeypatch.setattr(cpu_attention, "STRIP_BYTES", 4 * 6 * WIDTH * MIN_STRIP)
    cpu_attention._strips_of_rows.cache_clear()
    assert max(errors(torch.float32, PACKED, 0.25, None)) < 2e-6
    cpu_attention._strips_of_rows.cache_clear()


def test_strips_cover_every_query_once_and_only_its_sample() -> None:
    bounds = torch.tensor(PACKED, dtype=torch.int32)
    for rows, strips in strips_of_rows(bounds, 2, WIDTH, 6, None):
        assert [strip.start for strip in strips] == [0, *(strip.stop for strip in strips[:-1])]
        assert strips[-1].stop == WIDTH
        starts = [start for start in PACKED if start // WIDTH == rows.start]
        assert all(strip.first == max(s % WIDTH for s in starts if s % WIDTH <= strip.start) for strip in strips)


@pytest.mark.parametrize("bounds", [[0, 700], [0, 130, 290, 700], [0, *range(7, 700, 9), 700]])
@pytest.mark.parametrize("heads", [9, 600])
def test_strips_cover_every_query_once_and_begin_with_the_first_key_it_sees(bounds, heads):
    first_keys = torch.cat([torch.full((b - a,), a) for a, b in pairwise(bounds)])
    strips = cut_strips(first_keys, bounds, heads)
    assert [strip.start for strip in strips] == [0, *(strip.stop for strip in strips[:-1])] and strips[-1].stop == 700
    for strip in strips:
        assert strip.first == first_keys[strip.start]
        assert strip.stop - strip.start <= strip_length(heads, strip.stop - strip.first)


def test_long_samples_begin_a_strip_and_short_ones_share_it():
    first_keys = torch.cat([torch.full((n,), start) for n, start in ((250, 0), (250, 250), (20, 500), (20, 520))])
    strips = cut_strips(first_keys, [0, 250, 500, 520, 540], 9)
    assert {0, 250} <= {strip.start for strip in strips} and 520 not in {strip.start for strip in strips}
