"""The changes of several models by one call of a kernel: those that torch computes, whatever stands beside them."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_peft.kernels import products, segment_changes
from lightning_peft.kernels.native.library import library, without_kernels
from lightning_peft.kernels.segments import Segment, add_segments
from lightning_peft.quantization.frozen_base import frozen_base
from lightning_peft.training.recomputation import recomputing

pytestmark = pytest.mark.skipif(library() is None, reason="a processor with AVX-512 and bf16")
IN, OUT = 80, 144
"""Widths that fill no panel of 64."""


class Case:
    """A layer in bf16, and changes on all rows of x."""

    def __init__(self, counts: Sequence[int], ranks: Sequence[int], bias: bool = True):
        torch.manual_seed(0)
        self.layer = nn.Linear(IN, OUT, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
        bounds = torch.tensor([0, *counts]).cumsum(0).tolist()
        self.segments = [Segment(bounds[i], bounds[i + 1], 0.5 + i) for i in range(len(counts))]
        self.x = torch.randn(bounds[-1], IN, dtype=torch.bfloat16, requires_grad=True)
        self.factors = [
            (torch.randn(rank, IN, requires_grad=True), torch.randn(OUT, rank, requires_grad=True)) for rank in ranks
        ]
        self.direction = torch.randn(bounds[-1], OUT, dtype=torch.bfloat16)

    def results(self, only: Sequence[int] = ()) -> list[Tensor]:
        """Return output and gradients; of some changes, on their rows, with `only`."""
        x, segments, factors, direction = self.x, self.segments, self.factors, self.direction
        if only:
            x = torch.cat([x.detach()[segments[number].rows] for number in only]).requires_grad_()
            direction = torch.cat([direction[segments[number].rows] for number in only])
            counts = [segments[number].stop - segments[number].start for number in only]
            bounds = torch.tensor([0, *counts]).cumsum(0).tolist()
            segments = [
                segments[number]._replace(start=bounds[place], stop=bounds[place + 1])
                for place, number in enumerate(only)
            ]
            factors = [factors[number] for number in only]
        base = frozen_base(self.layer, x)
        assert base is not None
        output = add_segments(base, x, segments, factors)
        learnt = [factor for pair in factors for factor in pair if factor.requires_grad]
        return [output, *torch.autograd.grad(output, [x, *learnt], direction)]


def is_by_kernel(output: Tensor) -> bool:
    return type(output.grad_fn).__name__ == f"{segment_changes.SegmentChanges.__name__}Backward"


def assert_near(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Compare to two units of bf16's last place of the largest number: torch rounds what the kernel sums in fp32."""
    for left, right in zip(found, expected, strict=True):
        assert left.dtype == right.dtype and left.shape == right.shape
        torch.testing.assert_close(left, right, rtol=0, atol=2**-7 * float(right.detach().abs().max()))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("counts", "ranks"),
    [((3, 130, 1), (1, 8, 5)), ((200, 97), (64, 16)), ((400, 9), (33, 2)), ((7, 7, 7, 7, 7, 7), (4,) * 6)],
)
def test_changes_are_those_of_torch(counts: tuple[int, ...], ranks: tuple[int, ...]) -> None:
    case = Case(counts, ranks)
    found = case.results()
    assert is_by_kernel(found[0])
    with without_kernels():
        expected = case.results()
    assert not is_by_kernel(expected[0])
    assert_near(found, expected)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("bias", [True, False])
def test_base_without_amx_is_added_by_its_kernel(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows enough for a copy of the weight, which a processor without AMX multiplies by the kernel both ways."""
    case, transposed = Case((150, 97), (5, 16), bias), []
    with without_kernels():
        expected = case.results()
    by_kernel = products.sum_by_kernel

    def noted(*operands: Any, **options: Any) -> None:
        transposed.append(operands[6])
        by_kernel(*operands, **options)

    monkeypatch.setattr(products, "kernels_are_fastest", lambda: True)
    monkeypatch.setattr(products, "sum_by_kernel", noted)
    found = case.results()
    assert is_by_kernel(found[0]) and transposed == [True, False]
    assert_near(found, expected)


@pytest.mark.parametrize(
    "again",
    [partial(checkpoint, use_reentrant=False), lambda run, x: recomputing(run)(x)],
    ids=["block", "elementwise"],
)
def test_gradients_are_the_same_where_a_block_runs_again(again: Callable[..., Tensor]) -> None:
    case = Case((30, 40), (8, 3))
    learnt = [case.x, *(factor for pair in case.factors for factor in pair)]

    def block(x: Tensor) -> Tensor:
        gated = nn.functional.silu(x) * x  # kept as x where elementwise operations run again
        base = frozen_base(case.layer, gated)
        assert base is not None
        output = add_segments(base, gated, case.segments, case.factors)
        assert is_by_kernel(output)
        return output

    expected = torch.autograd.grad(block(case.x), learnt, case.direction)
    found = torch.autograd.grad(again(block, case.x), learnt, case.direction)
    assert all(torch.equal(*both) for both in zip(found, expected, strict=True))


@pytest.mark.usefixtures("threads")
def test_a_change_does_not_depend_on_those_beside_it() -> None:
    """To the bit, but for the base's products, which are zero here: oneDNN sums them by the number of rows."""
    case = Case((40, 130, 90), (8, 16, 3), bias=False)
    case.layer.weight.zero_()
    together = case.results()
    for number in range(3):
        pair = [number, (number + 1) % 3]
        beside = case.results(pair)
        stop = case.segments[number].stop - case.segments[number].start
        own = [*(part[case.segments[number].rows] for part in together[:2]), *together[2 + 2 * number : 4 + 2 * number]]
        assert all(torch.equal(*both) for both in zip(own[:2], [part[:stop] for part in beside[:2]], strict=True))
        assert_near(own[2:], beside[2:4])  # more threads than changes sum the gradients of one in parts


def test_frozen_factors_have_no_gradient() -> None:
    case = Case((30, 40), (8, 8))
    case.factors[0][0].requires_grad_(False)
    found = case.results()
    assert is_by_kernel(found[0]) and len(found) == 5
    with without_kernels():
        assert_near(found, case.results())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("broken", ["A", "B", "x"])
def test_what_is_not_finite_stays_with_its_change(broken: str, value: float) -> None:
    case = Case((30, 40), (8, 4))
    with torch.no_grad():
        {"A": case.factors[0][0][0], "B": case.factors[0][1][0], "x": case.x[0]}[broken].fill_(value)
    output, grad_x, *grads = case.results()
    assert is_by_kernel(output) and not output[:30].isfinite().all()
    assert output[30:].isfinite().all() and grad_x[30:].isfinite().all()
    assert all(grad.isfinite().all() for grad in grads[2:])


@pytest.mark.parametrize(
    "why", ["rows without a change", "a rank above a panel", "factors in bf16", "much work", "one change"]
)
def test_others_are_torchs(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment_changes, "kernels_are_fastest", lambda: False)
    if why == "much work":
        monkeypatch.setattr(segment_changes, "MOST_WORK", 35 * 8 * (IN + OUT) - 1)
    case = Case((30, 40), (8, 65 if why == "a rank above a panel" else 8))
    if why == "rows without a change":
        case.segments[1] = case.segments[1]._replace(stop=60)
    if why == "factors in bf16":
        case.factors = [tuple(factor.detach().bfloat16().requires_grad_() for factor in pair) for pair in case.factors]  # type: ignore[misc]
    assert not is_by_kernel(case.results([1] if why == "one change" else [])[0])
