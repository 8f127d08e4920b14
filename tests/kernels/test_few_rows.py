"""Products of few rows: each output is one sum in one order, whatever rows stand beside it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_peft.kernels import few_rows
from lightning_peft.kernels.native.library import FEW_ROWS, library

pytestmark = pytest.mark.skipif(library(FEW_ROWS) is None, reason="no processor with AVX2, or no g++")

ROUNDING = 3e-7
"""fp32's, of sums of some hundred products, against fp64."""


def within_rounding(actual: Tensor, expected: Tensor) -> bool:
    return bool((actual.double() - expected).abs().max() <= ROUNDING * expected.abs().max() * 8)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 16, 64])
@pytest.mark.parametrize(("in_features", "out_features"), [(64, 8), (576, 56), (8, 1000)])
def test_product_is_that_of_fp64(rows: int, in_features: int, out_features: int) -> None:
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, in_features), torch.randn(out_features, in_features)
    bias = torch.randn(out_features)
    expected = x.double() @ weight.double().t()
    with torch.no_grad():
        assert few_rows.takes(x, weight, None) and few_rows.takes(x, weight, bias)
        assert within_rounding(few_rows.product(x, weight, None), expected)
        assert within_rounding(few_rows.product(x, weight, bias), expected + bias)


def test_a_row_is_the_same_in_any_batch_on_any_threads() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(13, 136), torch.randn(1016, 136)
    pairs = [None if row % 5 == 4 else (torch.randn(row + 1, 136), torch.randn(row + 1, 1016)) for row in range(13)]
    threads = torch.get_num_threads()
    with torch.no_grad():
        together = few_rows.add_low_rank(x, few_rows.RowFactors.of(pairs), few_rows.product(x, weight, None))
        torch.set_num_threads(2)
        try:
            for row in range(13):
                own = few_rows.RowFactors.of(pairs[row : row + 1])
                alone = few_rows.add_low_rank(x[row : row + 1], own, few_rows.product(x[row : row + 1], weight, None))
                assert torch.equal(together[row], alone[0])
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("rank", [1, 4, 6, 16])
def test_each_row_has_its_own_pair(rank: int) -> None:
    torch.manual_seed(rank)
    x, output = torch.randn(3, 64), torch.randn(3, 48)
    A, B = torch.randn(2, rank, 64), torch.randn(2, rank, 48)
    expected = output.double()
    for row, pair in ((0, 1), (2, 0)):
        expected[row] += x[row].double() @ A[pair].double().t() @ B[pair].double()
    with torch.no_grad():
        few_rows.add_low_rank(x, few_rows.RowFactors.of([(A[1], B[1]), None, (A[0], B[0])]), output)
    assert within_rounding(output, expected)


def test_other_products_are_torchs() -> None:
    x, weight = torch.randn(2, 64), torch.randn(8, 64)
    assert not few_rows.takes(x, weight, None)  # gradients may be asked for
    with torch.no_grad():
        assert not few_rows.takes(x.bfloat16(), weight, None)
        assert not few_rows.takes(x, weight.bfloat16(), None)
        assert not few_rows.takes(x, torch.randn(64, 8).t(), None)
        assert not few_rows.takes(torch.randn(65, 64), weight, None)
        assert not few_rows.takes(torch.randn(2, 60), torch.randn(8, 60), None)
        assert not few_rows.takes(x, weight, torch.randn(8).bfloat16())
        assert not few_rows.takes(x, weight, torch.randn(16)[::2])


@pytest.mark.parametrize(
    "strange", [Tensor.bfloat16, lambda factor: factor.t().contiguous().t()], ids=["bf16", "strided"]
)
@pytest.mark.parametrize("side", [0, 1], ids="AB")
def test_factors_that_the_kernel_would_misread_are_an_error(side: int, strange: Callable[[Tensor], Tensor]) -> None:
    pair = [torch.randn(4, 64), torch.randn(4, 48)]
    pair[side] = strange(pair[side])
    with pytest.raises(AssertionError, match="the kernel reads contiguous fp32 on the host"):
        few_rows.RowFactors.of([None, (pair[0], pair[1])])
