"""The changes of several models by one call of a kernel: those that torch computes, whatever stands beside them."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn

from lightning_peft.kernels import segment_changes
from lightning_peft.kernels.native.library import library, without_kernels
from lightning_peft.kernels.segments import Segment, add_segments
from lightning_peft.quantization.frozen_base import frozen_base

pytestmark = pytest.mark.skipif(library() is None, reason="a processor with AVX-512 and bf16")
IN, OUT = 80, 144
"""Widths that fill no panel of 64."""


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Fewer threads than changes, and more."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


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

    def results(self, only: int | None = None) -> list[Tensor]:
        """Return output and gradients; of one change alone, on its own rows, with `only`."""
        x, segments, factors, direction = self.x, self.segments, self.factors, self.direction
        if only is not None:
            rows = segments[only].rows
            x, direction = x.detach()[rows].requires_grad_(), direction[rows]
            segments = [Segment(0, len(x), segments[only].scaling)]
            factors = factors[only : only + 1]
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
    [((3, 130, 1), (1, 8, 5)), ((200, 97), (64, 16)), ((400,), (33,)), ((7, 7, 7, 7, 7, 7), (4,) * 6)],
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
def test_a_change_does_not_depend_on_those_beside_it() -> None:
    """To the bit, but for the base's products, which are zero here: oneDNN sums them by the number of rows."""
    case = Case((40, 130, 90), (8, 16, 3), bias=False)
    case.layer.weight.zero_()
    together = case.results()
    for number, segment in enumerate(case.segments):
        alone = case.results(only=number)
        own = [*(part[segment.rows] for part in together[:2]), *together[2 + 2 * number : 4 + 2 * number]]
        if torch.get_num_threads() <= len(case.segments):  # more threads sum the gradients of a change in parts
            assert all(torch.equal(left, right) for left, right in zip(own[:2], alone[:2], strict=True))
        assert_near(own, alone)


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


@pytest.mark.parametrize("why", ["rows without a change", "a rank above a panel", "factors in bf16", "much work"])
def test_others_are_torchs(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment_changes, "kernels_are_fastest", lambda: False)
    if why == "much work":
        monkeypatch.setattr(segment_changes, "MOST_WORK", 35 * 8 * (IN + OUT) - 1)
    case = Case((30, 40), (8, 65 if why == "a rank above a panel" else 8))
    if why == "rows without a change":
        case.segments[1] = case.segments[1]._replace(stop=60)
    if why == "factors in bf16":
        case.factors = [tuple(factor.detach().bfloat16().requires_grad_() for factor in pair) for pair in case.factors]  # type: ignore[misc]
    assert not is_by_kernel(case.results()[0])
