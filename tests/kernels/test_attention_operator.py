"""Attention on a CPU against the formula, in both implementations, at lengths of several strips and blocks."""

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lightning_peft.kernels.attention import grouping, operator
from lightning_peft.kernels.attention import native as native_attention
from lightning_peft.kernels.attention.grouping import MAX_STRIP, MIN_STRIP
from lightning_peft.kernels.native.library import library, without_kernels
from lightning_peft.models.attention import varlen_attention

WIDTH = 2 * MAX_STRIP + 44


def inputs(dtype: torch.dtype, rows: int = 2, spread: float = 1.0) -> list[Tensor]:
    """Return query, key and value with 6, 2 and 2 heads of 16, laid out as models do, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(rows, WIDTH, heads, 16, generator=generator) for heads in (6, 2, 2, 6)]
    drawn[0] *= spread
    return [*(x.to(dtype).transpose(1, 2) for x in drawn[:3]), drawn[3].to(dtype)]


def by_formula(query: Tensor, key: Tensor, value: Tensor, bounds: list[int], scaling: float, window: int) -> Tensor:
    """Return the attention with the mask of all tokens written out, (rows, WIDTH, heads, D)."""
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
    """Return the output's and gradients' distance from the formula in fp64, as a share of its norm."""
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


@pytest.fixture
def kernel() -> None:
    if library() is None:
        pytest.skip("no processor with AVX-512 and bf16, or no compiler")


@pytest.fixture
def without_kernel() -> Iterator[None]:
    with without_kernels():
        yield


@pytest.fixture(params=["kernel", "without_kernel"])
def either(request: pytest.FixtureRequest) -> None:
    """Compute with both implementations of bf16."""
    request.getfixturevalue(request.param)
    chosen = operator.implementation(torch.empty(1, 1, 1, 16, dtype=torch.bfloat16))
    assert (chosen is native_attention) == (request.param == "kernel")


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("spread", [1.0, 20.0])
def test_bf16_is_off_by_its_rounding_whatever_the_scores(spread: float) -> None:
    # Half a unit in bf16's last place is 2^-9 = 0.002; scores of 80 rounded to bf16 would alone be off by 0.25.
    output, *gradients = errors(torch.bfloat16, PACKED, 0.3, None, spread)
    assert output < 0.003 and max(gradients) < 0.012


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(("window", "most"), [(None, 0.0035), (50, 0.0035), (2, 0.005)])
@pytest.mark.parametrize("bounds", [PACKED, [0, WIDTH, 2 * WIDTH]], ids=["packed", "a sample a row"])
def test_the_kernel_rounds_what_it_keeps_and_nothing_else(bounds: list[int], window: int | None, most: float) -> None:
    # P, dS, O and the gradients, each by at most 2^-8 and by 0.0017 in the mean of squares; scores stay in fp32. With
    # two keys dP - <dO, O> is a small difference, so O's rounding counts for more.
    assert max(errors(torch.bfloat16, bounds, 0.3, window)) < most


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("heads", "key_heads", "head_dim"), [(2, 2, 16), (6, 1, 48), (4, 2, 80), (2, 1, 128)])
def test_the_kernel_takes_any_heads_layout_and_number_of_threads(
    heads: int, key_heads: int, head_dim: int, threads: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    # A fused projection leaves them so: rows of all heads side by side.
    drawn = torch.randn(2, WIDTH, heads + 2 * key_heads, head_dim, generator=generator).bfloat16().transpose(1, 2)
    bounds = torch.tensor(PACKED, dtype=torch.int32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = drawn.clone().requires_grad_()
        output = varlen_attention(*ours.split([heads, key_heads, key_heads], 1), bounds, WIDTH, 0.2)
        output.square().sum().backward()
    finally:
        torch.set_num_threads(before)
    exact = drawn.double().requires_grad_()
    expected = by_formula(*exact.split([heads, key_heads, key_heads], 1), PACKED, 0.2, WIDTH)
    expected.backward(2 * output.detach().double())
    for actual, wanted in [(output.detach(), expected.detach()), (ours.grad, exact.grad)]:
        assert float((actual.double() - wanted).norm() / wanted.norm()) < 0.004


@pytest.mark.usefixtures("kernel")
def test_what_is_not_a_number_is_passed_on() -> None:
    *drawn, _ = inputs(torch.bfloat16)
    drawn[0][0, 0, 120, 3] = torch.nan
    output = varlen_attention(*drawn, torch.tensor(PACKED, dtype=torch.int32), WIDTH, 0.3)
    broken = output.isnan().flatten(2).any(-1).nonzero().tolist()
    assert broken == [[0, 120]]


@pytest.fixture
def small_strips(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have so little memory for scores that every strip is of the shortest."""
    monkeypatch.setattr(grouping, "STRIP_BYTES", 4 * 6 * WIDTH * MIN_STRIP)
    grouping.arrange.cache_clear()
    yield
    grouping.arrange.cache_clear()


@pytest.mark.usefixtures("small_strips")
def test_shortest_strips_equal_the_formula() -> None:
    assert max(errors(torch.float32, PACKED, 0.25, None)) < 2e-6


@pytest.mark.usefixtures("without_kernel")
def test_padding_of_a_group_reaches_no_gradient() -> None:
    bounds = [0, 40, 78, 114, 148, 180, 212, 241, 260, WIDTH, 2 * WIDTH]
    arrangement = grouping.arrange(tuple(pairwise(bounds)), 6, None)
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
