"""Several frozen layers that read one input, each with a low-rank change, in one autograd function.

Queries, keys and values read the same tensor, and so do gate and up. Their A are stacked: the input is read once for
all changes, once for all gradients of A, and its own gradient is one sum. Each layer's output is that of
`low_rank.add_low_rank`, and a test holds the two together.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_peft.kernels.codes import Codes, dequantize, has_triton, in_features_of
from lightning_peft.kernels.frozen_linear import DENSE, Base, base_with_product
from lightning_peft.kernels.products import padded, summed_product

torch.library.define("lightning_peft::scaled_products", "(Tensor[] rows, Tensor[] factors, float scaling) -> Tensor")
torch.library.define("lightning_peft::factor_gradient", "(Tensor left, Tensor right) -> Tensor")
torch.library.define(
    "lightning_peft::output_gradients",
    "(Tensor[] grads, Tensor[] factors, Tensor inner, float scaling) -> (Tensor, Tensor[])",
)
torch.library.define(
    "lightning_peft::read_once",
    "(Tensor grad, Tensor factor, Tensor inner, float scaling, *, Tensor(a!) inner_parts, Tensor(b!) B_parts) -> ()",
)
torch.library.define(
    "lightning_peft::add_up", "(Tensor inner_parts, Tensor B_parts, *, Tensor(a!) grad_inner) -> Tensor"
)
torch.library.define(
    "lightning_peft::shared_input_gradient",
    "(Tensor[] grads, Tensor?[] weights, Tensor inner, Tensor factor, str form, int block_size) -> Tensor",
)

SUMS = 8192
"""Sums that a program of `read_once` keeps in its registers: the columns that it reads times the rank. Ours."""
PROGRAMS = 256
"""Its programs to aim for: twice the multiprocessors of an H100. Ours."""
LEAST_ROWS = 256
"""Rows of a program at the least, so that what it writes is small beside what it reads. Ours."""
LARGEST_RANK = 32
"""Above it, what `read_once` writes is as large as what it saves. Ours."""


def can_share(bases: Sequence[Base]) -> bool:
    """Return whether layers with these bases, all frozen, can be computed together: alike but for their weights."""
    first = bases[0]
    frozen = all(base.tensors[-1] is None or not base.tensors[-1].requires_grad for base in bases)
    return frozen and all(base[:3] == first[:3] for base in bases)


def add_low_rank_to_each(
    bases: Sequence[Base],
    x: Tensor,
    factors: Sequence[tuple[Tensor, Tensor]],
    scaling: float,
    copies: tuple[Tensor, Sequence[Tensor]] | None = None,
) -> tuple[Tensor, ...]:
    """Return base_i + scaling * x A_i^T B_i^T of every layer, (..., out_features_i).

    `copies` are all A below each other, and each B, in the products' dtype: where they are given, nothing is cast.
    """
    first = bases[0]
    tensors = [tensor for base in bases for tensor in base.tensors]
    A, B = zip(*factors, strict=True)
    stack, cast_B = (None, [None] * len(B)) if copies is None else copies
    form = first.dtype, first.form, first.block_size
    return SharedLowRankProduct.apply(x, len(bases), scaling, *form, *A, *B, stack, *cast_B, *tensors)


class SharedLowRankProduct(torch.autograd.Function):
    """base_i + scaling * x A_i^T B_i^T for every i. Keeps x once, and the (N, R) products of all."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, count: int, scaling: float, dtype: torch.dtype, form: str, block_size: int, *tensors: Any
    ) -> tuple[Tensor, ...]:
        A, B, (stack, *cast_B), frozen = _parts(tensors, count)
        stack = torch.cat(A).to(dtype) if stack is None else stack
        factors = [factor.to(dtype) if given is None else given for factor, given in zip(B, cast_B, strict=True)]
        cast = x.to(dtype)
        inner = torch.ops.lightning_peft.scaled_products([cast.reshape(-1, x.shape[-1])], [stack.t()], scaling)
        outputs = tuple(
            base_with_product(cast, Base(dtype, form, block_size, tuple(own)), part, factor)
            for own, part, factor in zip(frozen, inner.split([len(factor) for factor in A], 1), factors, strict=True)
        )
        ctx.save_for_backward(x, inner, stack, *factors, *(tensor for own in frozen for tensor in own[:-1]))
        ctx.form, ctx.scaling, ctx.count = (form, block_size), scaling, count
        ctx.ranks, ctx.factor_dtypes = [len(factor) for factor in A], (A[0].dtype, B[0].dtype)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, stack, *rest = ctx.saved_tensors
        factors, frozen = rest[: ctx.count], rest[ctx.count :]
        dtype_A, dtype_B = ctx.factor_dtypes
        rows = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        dtype = rows[0].dtype
        grad_inner, grad_B = torch.ops.lightning_peft.output_gradients(rows, factors, inner, ctx.scaling)
        grad_B = [own.to(dtype_B) for own in grad_B]
        x_rows = x.reshape(-1, x.shape[-1]).to(dtype)
        grad_A = torch.ops.lightning_peft.factor_gradient(grad_inner, x_rows).to(dtype_A).split(ctx.ranks)
        grad_x = None
        if ctx.needs_input_grad[0]:
            x_shape, x_dtype = x.shape, x.dtype
            del x, x_rows  # they are large, and x's gradient is about to be made
            grad_x = torch.ops.lightning_peft.shared_input_gradient(rows, frozen, grad_inner, stack, *ctx.form)
            grad_x = grad_x.view(x_shape).to(x_dtype)
        nothing = (None,) * (len(ctx.needs_input_grad) - 6 - 2 * ctx.count)
        return grad_x, None, None, None, None, None, *grad_A, *grad_B, *nothing


def _parts(tensors: Sequence[Any], count: int) -> tuple[list[Tensor], list[Tensor], list[Any], list[list[Any]]]:
    """Return A, B, the copies, and every layer's own tensors, from the end of the function's arguments."""
    A, B = list(tensors[:count]), list(tensors[count : 2 * count])
    copies, frozen = list(tensors[2 * count : 3 * count + 1]), tensors[3 * count + 1 :]
    width = len(frozen) // count
    return A, B, copies, [list(frozen[start : start + width]) for start in range(0, len(frozen), width)]


@torch.library.impl("lightning_peft::scaled_products", "CompositeExplicitAutograd")
def scaled_products(rows: list[Tensor], factors: list[Tensor], scaling: float) -> Tensor:
    """Return scaling * rows_i factor_i of every i, (N, R_i), beside each other: (N, sum of R_i)."""
    result = rows[0].new_empty(len(rows[0]), sum(factor.shape[1] for factor in factors))
    _write_products(rows, factors, scaling, result)
    return result


def _write_products(rows: list[Tensor], factors: list[Tensor], scaling: float, into: Tensor) -> None:
    parts = into.split([factor.shape[1] for factor in factors], 1)
    for part, own, factor in zip(parts, rows, factors, strict=True):
        part.addmm_(own, factor, beta=0, alpha=scaling)  # the product applies the factor by itself


@torch.library.register_fake("lightning_peft::scaled_products")
def _(rows: list[Tensor], factors: list[Tensor], scaling: float) -> Tensor:
    return rows[0].new_empty(len(rows[0]), sum(factor.shape[1] for factor in factors))


@torch.library.impl("lightning_peft::factor_gradient", "CompositeExplicitAutograd")
def factor_gradient(left: Tensor, right: Tensor) -> Tensor:
    """Return left^T right, (N, M) and (N, K), in at least fp32: a gradient summed over N tokens."""
    return summed_product(left.t(), right)


@torch.library.register_fake("lightning_peft::factor_gradient")
def _(left: Tensor, right: Tensor) -> Tensor:
    dtype = torch.promote_types(left.dtype, torch.float32)
    return left.new_empty(left.shape[1], right.shape[1], dtype=dtype)


@torch.library.impl("lightning_peft::output_gradients", "CompositeExplicitAutograd")
def output_gradients(
    grads: list[Tensor], factors: list[Tensor], inner: Tensor, scaling: float
) -> tuple[Tensor, list[Tensor]]:
    """Return the products scaling * grad_i B_i beside each other, (N, sum of R_i), and each grad_i^T inner_i.

    The latter are (out_i, R_i), in at least fp32. grad_i (N, out_i), B_i (out_i, R_i) and inner (N, sum of R_i) have
    one dtype.
    """
    made = torch.empty_like(inner)
    sums = write_output_gradients(grads, factors, inner, scaling, made).split([factor.numel() for factor in factors])
    return made, [own.view(factor.shape) for own, factor in zip(sums, factors, strict=True)]


def write_output_gradients(
    grads: list[Tensor], factors: list[Tensor], inner: Tensor, scaling: float, into: Tensor
) -> Tensor:
    """Write the first of `output_gradients` into a tensor, and return the second one behind the other, (numbers,)."""
    ranks = [factor.shape[1] for factor in factors]
    if not reads_once(grads, ranks):
        _write_products(grads, factors, scaling, into)
        pairs = zip(grads, inner.split(ranks, 1), strict=True)
        return torch.cat([torch.ops.lightning_peft.factor_gradient(*pair).flatten() for pair in pairs])
    rows, sizes = len(inner), [factor.numel() for factor in factors]
    chunks = math.ceil(max(grad.shape[1] for grad in grads) / (SUMS // padded(max(ranks))))
    parts = min(math.ceil(PROGRAMS / chunks), math.ceil(rows / LEAST_ROWS))
    inner_parts = inner.new_empty(chunks, rows, sum(ranks), dtype=torch.float32)
    B_parts = inner.new_empty(parts, sum(sizes), dtype=torch.float32)
    own_parts = inner.split(ranks, 1), inner_parts.split(ranks, 2), B_parts.split(sizes, 1)
    for grad, factor, own, own_inner_parts, own_B_parts in zip(grads, factors, *own_parts, strict=True):
        options = {"inner_parts": own_inner_parts, "B_parts": own_B_parts}
        torch.ops.lightning_peft.read_once(_by_rows(grad), _by_rows(factor), own, scaling, **options)
    return torch.ops.lightning_peft.add_up(inner_parts, B_parts, grad_inner=into)


def _by_rows(matrix: Tensor) -> Tensor:
    """Return the matrix, or a copy where the numbers of a row do not lie side by side."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


@torch.library.register_fake("lightning_peft::output_gradients")
def _(grads: list[Tensor], factors: list[Tensor], inner: Tensor, scaling: float) -> tuple[Tensor, list[Tensor]]:
    dtype = torch.promote_types(inner.dtype, torch.float32)
    return inner.new_empty(inner.shape), [factor.new_empty(factor.shape, dtype=dtype) for factor in factors]


def reads_once(grads: Sequence[Tensor], ranks: Sequence[int]) -> bool:
    """Return whether Triton's kernels compute `output_gradients`: in 16 bits, of many rows, for small ranks."""
    first = grads[0]
    suits = first.is_cuda and first.dtype.itemsize == 2 and torch.version.hip is None and has_triton()
    return suits and len(first) >= LEAST_ROWS and max(ranks) <= LARGEST_RANK


@torch.library.impl("lightning_peft::read_once", "CUDA")
def _read_once(
    grad: Tensor, factor: Tensor, inner: Tensor, scaling: float, *, inner_parts: Tensor, B_parts: Tensor
) -> None:
    from lightning_peft.kernels.triton_gradients import read_once

    read_once(grad, factor, inner, scaling, inner_parts, B_parts)


@torch.library.impl("lightning_peft::add_up", "CUDA")
def _add_up(inner_parts: Tensor, B_parts: Tensor, *, grad_inner: Tensor) -> Tensor:
    from lightning_peft.kernels.triton_gradients import add_up

    return add_up(inner_parts, B_parts, grad_inner)


@torch.library.register_fake("lightning_peft::read_once")
def _(*_: Any, **__: Any) -> None:
    pass


@torch.library.register_fake("lightning_peft::add_up")
def _(inner_parts: Tensor, B_parts: Tensor, *, grad_inner: Tensor) -> Tensor:
    return B_parts.new_empty(B_parts.shape[1:])


@torch.library.impl("lightning_peft::shared_input_gradient", "CompositeExplicitAutograd")
def shared_input_gradient(
    grads: list[Tensor], weights: list[Tensor | None], inner: Tensor, factor: Tensor, form: str, block_size: int
) -> Tensor:
    """Return the sum of grad_i W_i plus inner factor, (N, in_features).

    `weights` has each layer's weight, or its codes; one dense weight exists at a time.
    """
    result = inner @ factor  # the small product comes first, for its digits: see `low_rank_sum`
    width = len(weights) // len(grads)
    for place, grad in enumerate(grads):
        own = weights[place * width : (place + 1) * width]
        assert own[0] is not None
        dense = own[0] if form == DENSE else dequantize(Codes(*own), form, block_size, grad.dtype)  # type: ignore[arg-type]
        result.addmm_(grad, dense.to(grad.dtype))
        del dense
    return result


@torch.library.register_fake("lightning_peft::shared_input_gradient")
def _(
    grads: list[Tensor], weights: list[Tensor | None], inner: Tensor, factor: Tensor, form: str, block_size: int
) -> Tensor:
    first = weights[0]
    assert first is not None
    return inner.new_empty(len(inner), first.shape[1] if form == DENSE else in_features_of(first, form))
