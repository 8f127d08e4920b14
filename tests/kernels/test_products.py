"""A frozen product with a low-rank term, and the gradients of its factors: kernels and torch against the formula."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_peft.kernels import products
from lightning_peft.kernels.native.library import library, without_kernels


@pytest.fixture(params=["products of torch", "kernels"])
def either(request: pytest.FixtureRequest) -> Iterator[str]:
    name: str = request.param
    if name == "kernels" and not products.kernels_are_fastest():
        pytest.skip("other products are faster here, or no compiler")
    with without_kernels() if name != "kernels" else nullcontext():
        yield name


def drawn(*shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def distance(actual: Tensor, expected: Tensor) -> float:
    """Return the distance as a share of what is expected."""
    return float((actual.double() - expected).norm() / expected.norm())


SHAPES = [(192, 64, 64, 16), (401, 48, 80, 5), (650, 130, 208, 64), (1000, 576, 192, 256)]
"""Rows, in, out and rank: whole tiles, and what is left over of tiles, panels and pairs."""


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_sum_is_rounded_once(
    shape: tuple[int, int, int, int], with_bias: bool, transposed: bool, either: str, threads: int
) -> None:
    rows, width, out, rank = shape
    x, weight, inner, factor, bias = drawn((rows, width), (width, out), (rows, rank), (rank, out), (out,))
    x = torch.cat((x, x), 1)[:, :width]  # a fused projection leaves it so
    expected = x.double() @ weight.double() + inner.double() @ factor.double()
    if with_bias:
        expected += bias.double()
    matrices = [matrix.t().contiguous() if transposed else matrix for matrix in (weight, factor)]
    assert products.takes_sum(x, matrices[0], inner, transposed) == (either == "kernels")
    arguments = x, matrices[0], inner, matrices[1], None, bias if with_bias else None, transposed
    output = torch.ops.lightning_peft.low_rank_sum(*arguments)
    # bf16 rounds by 2^-8 at most, 0.0017 in the mean of squares; torch adds the bias to what was rounded.
    assert distance(output, expected) < (0.003 if with_bias and either != "kernels" else 0.002)
    in_batches = torch.ops.lightning_peft.low_rank_sum(x.reshape(1, rows, width), *arguments[1:])
    assert in_batches.shape == (1, rows, out) and torch.equal(in_batches[0], output)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_is_added_to_what_is_there(shape: tuple[int, int, int, int], with_bias: bool, threads: int) -> None:
    rows, width, out, _ = shape
    x, weight, before, bias = drawn((rows, width), (out, width), (rows, out), (out,))
    expected = before.double() + x.double() @ weight.double().t() + with_bias * bias.double()
    given = bias if with_bias else None
    output = before.clone()
    products.add_product_(x, weight, given, output)
    assert distance(output, expected) < (0.003 if with_bias else 0.002)
    if library() is not None:  # the kernel itself, whether or not this processor has faster products
        inner, factor, output = x[:, :0], weight[:, :0], before.clone()
        products.sum_by_kernel(x, weight, inner, factor, None, given, True, output, onto=True)
        assert distance(output, expected) < 0.002


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("transposed", [True, False])
def test_a_change_below_the_products_rounding_is_kept(transposed: bool) -> None:
    """Each number's is lost or doubled, as it lies; their mean is there."""
    x, weight = drawn((512, 64), (64, 128))
    inner, factor = torch.ones(512, 16).bfloat16(), torch.full((16, 128), 2.0**-11).bfloat16()
    matrices = [matrix.t().contiguous() if transposed else matrix for matrix in (weight, factor)]
    output = torch.ops.lightning_peft.low_rank_sum(x, matrices[0], inner, matrices[1], None, None, transposed)
    change = (output.double() - x.double() @ weight.double()).mean()
    # Products of 8 in the mean have a unit of 2^-5, and roundings of 2^-7 whose mean over 65,536 is 3e-5.
    assert abs(change - 2.0**-7) < 1.2e-4


def test_a_gain_below_the_products_rounding_is_kept_by_the_kernel() -> None:
    if not products.kernels_are_fastest():
        pytest.skip("other products are faster here, or no compiler")
    x, weight, inner, factor, bias = drawn((512, 64), (128, 64), (512, 16), (128, 16), (128,))
    gain = 1 + torch.rand(128) / 1000
    exact = x.double() @ weight.double().t() + inner.double() @ factor.double().t()
    output = torch.ops.lightning_peft.low_rank_sum(x, weight, inner, factor, gain, bias, True).double()
    assert distance(output, gain.double() * exact + bias.double()) < 0.002
    measured = ((output - bias.double()) * exact).sum(0) / exact.square().sum(0)
    assert float((measured - gain).abs().max()) < 5e-4 and abs(float((measured - gain).mean())) < 4e-5


@pytest.mark.parametrize("shape", [(192, 64, 64, 16), (401, 48, 80, 6), (650, 16, 208, 64), (203, 1040, 16, 1)])
def test_gradients_of_the_factors(shape: tuple[int, int, int, int], either: str, threads: int) -> None:
    rows, width, out, rank = shape
    grad, x, inner, B = drawn((rows, out), (rows, width), (rows, rank), (out, rank))
    assert products.takes_gradients(grad, x, inner) == (either == "kernels")
    grad_inner, grad_A, grad_B = torch.ops.lightning_peft.low_rank_gradients(grad, x, inner, B)
    assert grad_inner.dtype == torch.bfloat16 and grad_A.dtype == grad_B.dtype == torch.float32
    assert grad_B.is_contiguous()
    assert distance(grad_inner, grad.double() @ B.double()) < 0.002
    # It comes of the rounded grad_inner. The kernel's sums stay in fp32; torch rounds them to bf16.
    bound = 1e-6 if either == "kernels" else 0.002
    assert distance(grad_A, grad_inner.double().t() @ x.double()) < bound
    assert distance(grad_B, grad.double().t() @ inner.double()) < bound


@pytest.mark.parametrize("shape", [(1, 16), (37, 48), (2048, 576)])
def test_dots_of_columns(shape: tuple[int, int], either: str, threads: int) -> None:
    left, right = drawn(shape, shape)
    dots = torch.ops.lightning_peft.column_dots(left, right)
    assert dots.dtype == torch.float32
    # torch rounds each product to bf16 before the sum.
    assert distance(dots, (left.double() * right.double()).sum(0)) < (1e-5 if either == "kernels" else 0.003)


def test_few_rows_odd_widths_and_other_dtypes_are_left_to_torch() -> None:
    x, weight, inner = drawn((256, 64), (64, 48), (256, 16))
    assert products.takes_sum(x, weight, inner, False) == products.kernels_are_fastest()
    assert not products.takes_sum(x[: products.MIN_ROWS - 1], weight, inner, False)
    assert not products.takes_sum(x.float(), weight.float(), inner.float(), False)
    assert not products.takes_sum(x, weight[:, :40].contiguous(), inner, False)
    assert not products.takes_sum(x[:, :63], weight[:63], inner, False)
    assert not products.takes_gradients(x, x, torch.cat([inner] * 5, 1))


def test_products_of_torch_are_those_of_the_operands_dtype() -> None:
    x, weight, inner, factor = drawn((5, 3), (3, 7), (5, 2), (2, 7), dtype=torch.float64)
    output: Any = torch.ops.lightning_peft.low_rank_sum(x, weight, inner, factor, None, None, False)
    torch.testing.assert_close(output, x @ weight + inner @ factor)


@pytest.mark.parametrize(
    ("rows", "out", "threads", "parts"), [(2048, 1536, 2, 1), (2048, 576, 2, 2), (2048, 192, 16, 10), (200, 576, 8, 1)]
)
def test_every_thread_gets_as_many_panels(rows: int, out: int, threads: int, parts: int) -> None:
    assert products.parts_of(rows, out, threads) == parts


def test_the_compiler_is_told_the_shapes() -> None:
    x, weight, inner, factor, bias = drawn((256, 64), (48, 64), (256, 16), (48, 16), (48,))
    grad = torch.randn(256, 48).bfloat16()
    for operator, arguments in (
        (torch.ops.lightning_peft.low_rank_sum, (x, weight, inner, factor, torch.rand(48), bias, True)),
        (torch.ops.lightning_peft.low_rank_gradients, (grad, x, inner, factor)),
        (torch.ops.lightning_peft.column_dots, (x, x)),
    ):
        torch.library.opcheck(operator.default, arguments)
