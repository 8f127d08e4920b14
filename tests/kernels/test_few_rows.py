"""Products of few rows: each output is one sum in one order, whatever rows stand beside it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_peft.kernels import few_rows
from lightning_peft.kernels.few_rows import BUILDS, RowFactors
from lightning_peft.kernels.native.library import AMX, library

DTYPES = [
    pytest.param(
        dtype,
        marks=pytest.mark.skipif(
            library(BUILDS[dtype]) is None, reason="no processor with its instructions, or no g++"
        ),
    )
    for dtype in BUILDS
]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
ROUNDING = {torch.float32: 2.4e-6, torch.bfloat16: 2**-8}
"""Error of outputs, in parts of the largest: of sums of some hundred products in fp32, and of one rounding to bf16."""


def within_rounding(actual: Tensor, expected: Tensor) -> bool:
    return bool((actual.double() - expected).abs().max() <= ROUNDING[actual.dtype] * expected.abs().max())


def random(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape).to(dtype)


@each_dtype
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 16, 17, 33, 64])
@pytest.mark.parametrize(("in_features", "out_features"), [(64, 8), (576, 64), (576, 56), (8, 1000), (72, 40)])
def test_product_is_that_of_fp64(rows: int, in_features: int, out_features: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    x, weight = random(dtype, rows, in_features), random(dtype, out_features, in_features)
    bias = random(dtype, out_features)
    expected = x.double() @ weight.double().t()
    with torch.no_grad():
        assert few_rows.takes(x, weight, None) and few_rows.takes(x, weight, bias)
        assert within_rounding(few_rows.product(x, weight, None), expected)
        assert within_rounding(few_rows.product(x, weight, bias), expected + bias)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("in_features", "out_features"), [(1, 1), (31, 3), (33, 35), (101, 67)])
def test_widths_that_fill_no_vector_are_exact(in_features: int, out_features: int, dtype: torch.dtype) -> None:
    torch.manual_seed(in_features)
    x, weight, bias = (
        random(dtype, 5, in_features),
        random(dtype, out_features, in_features),
        random(dtype, out_features),
    )
    pair = random(dtype, 7, in_features), random(dtype, 7, out_features)
    expected = x.double() @ weight.double().t() + bias + x.double() @ pair[0].double().t() @ pair[1].double()
    with torch.no_grad():
        assert within_rounding(few_rows.product(x, weight, bias, RowFactors.of([pair] * 5, dtype)), expected)


@each_dtype
@pytest.mark.parametrize(("width", "out"), [(136, 1016), (160, 1024)], ids=["odd", "of whole tiles"])
def test_a_row_is_the_same_in_any_batch_on_any_threads(width: int, out: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = random(dtype, 37, width), random(dtype, out, width)
    pairs = [None if r % 5 == 4 else (random(dtype, r + 1, width), random(dtype, r + 1, out)) for r in range(37)]
    threads = torch.get_num_threads()
    with torch.no_grad():
        together = few_rows.product(x, weight, None, RowFactors.of(pairs, dtype))
        torch.set_num_threads(2)
        try:
            for row in range(37):
                own = RowFactors.of(pairs[row : row + 1], dtype)
                alone = few_rows.product(x[row : row + 1], weight, None, own)
                assert torch.equal(together[row], alone[0])
        finally:
            torch.set_num_threads(threads)


@each_dtype
@pytest.mark.parametrize("rank", [1, 4, 6, 16])
def test_each_row_has_its_own_pair(rank: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rank)
    x, weight = random(dtype, 3, 64), random(dtype, 48, 64)
    A, B = random(dtype, 2, rank, 64), random(dtype, 2, rank, 48)
    expected = x.double() @ weight.double().t()
    for row, pair in ((0, 1), (2, 0)):
        expected[row] += x[row].double() @ A[pair].double().t() @ B[pair].double()
    with torch.no_grad():
        factors = RowFactors.of([(A[1], B[1]), None, (A[0], B[0])], dtype)
        assert within_rounding(few_rows.product(x, weight, None, factors), expected)


@pytest.mark.skipif(library(AMX) is None, reason="no processor with AMX, or no g++")
@pytest.mark.parametrize("rows", [1, 16, 40])
def test_tiles_give_what_vectors_do(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, weight, bias = (random(torch.bfloat16, *shape) for shape in ((rows, 96), (64, 96), (64,)))
    pairs = [(random(torch.bfloat16, 5, 96), random(torch.bfloat16, 5, 64)) for _ in range(rows)]
    factors = RowFactors.of(pairs, torch.bfloat16)
    with torch.no_grad():
        assert few_rows.takes_tiles(weight) and not few_rows.takes_tiles(weight[:40])
        tiles = few_rows.product(x, weight, bias, factors)
        monkeypatch.setattr(few_rows, "takes_tiles", lambda weight: False)
        vectors = few_rows.product(x, weight, bias, factors)
    changes = [row.double() @ A.double().t() @ B.double() for row, (A, B) in zip(x, pairs, strict=True)]
    expected = torch.stack(changes) + x.double() @ weight.double().t() + bias.double()
    assert within_rounding(tiles, expected) and within_rounding(vectors, expected)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_change_below_the_rounding_of_the_product_is_not_lost(dtype: torch.dtype) -> None:
    """A change of a 64th of the output's last place moves as many outputs over the edge as it should on average."""
    torch.manual_seed(0)
    x, weight = random(dtype, 16, 256), random(dtype, 2048, 256)
    pair = torch.full((1, 256), 2**-8, dtype=dtype) * x[0].sign(), torch.full((1, 2048), 2**-6, dtype=dtype)
    with torch.no_grad():
        change = few_rows.product(x, weight, None, RowFactors.of([pair] * 16, dtype)).double()
        change -= few_rows.product(x, weight, None).double()
    expected = (x.double() @ pair[0].double().t() @ pair[1].double())[0].mean()
    assert abs(change[0].mean() - expected) < 0.2 * abs(expected)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("each", [(), (1,), (5,), (3, 7)], ids=str)
@pytest.mark.parametrize(("in_features", "out_features"), [(576, 56), (72, 40), (31, 3), (1, 1)])
def test_changes_of_many_rows_are_those_of_fp64(
    in_features: int, out_features: int, each: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x = random(dtype, 5, *each, in_features)
    pairs = [(random(dtype, rank, in_features), random(dtype, rank, out_features)) for rank in (1, 4, 6, 16)]
    expected = [x[row].double() @ A.double().t() @ B.double() for row, (A, B) in enumerate(pairs)]
    with torch.no_grad():
        assert few_rows.takes_changes(x)
        found = few_rows.changes(x, RowFactors.of([*pairs, None], dtype), out_features)
        assert found.shape == (5, *each, out_features) and not found[4].any()
        assert all(within_rounding(found[row], own) for row, own in enumerate(expected))
        alone = few_rows.changes(x[1:2], RowFactors.of(pairs[1:2], dtype), out_features)
        assert torch.equal(found[1:2], alone)


@pytest.mark.skipif(library(BUILDS[torch.float32]) is None, reason="no processor with AVX2, or no g++")
def test_other_products_are_torchs() -> None:
    x, weight = torch.randn(2, 64), torch.randn(8, 64)
    assert not few_rows.takes(x, weight, None)  # gradients may be asked for
    with torch.no_grad():
        assert not few_rows.takes(x.bfloat16(), weight, None)
        assert not few_rows.takes(x, weight.bfloat16(), None)
        assert not few_rows.takes(x.half(), weight.half(), None)
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
    with pytest.raises(AssertionError, match=r"the kernel reads contiguous torch\.float32 on the host"):
        RowFactors.of([None, (pair[0], pair[1])], torch.float32)
