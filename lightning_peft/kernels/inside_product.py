"""Low-rank changes inside the products of their frozen layers, for layers that read one input.

A product of [x | s x A^T] and [W | B]^T is the frozen product and the change in the same sums, one of [g | s g B] and
[W; A] is the input's gradient, g being an output's: nothing of the size of an output, or of an input, is written for a
change alone. Weights have room at their edges, or are decoded to where there is, and what makes x and g writes them
into wider rows, as a compiler arranges it; without one they are copied. Each layer's output is that of
`low_rank.add_low_rank`.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_peft.kernels.codes import Codes, dequantize, dequantize_with_edge, has_triton
from lightning_peft.kernels.frozen_linear import DENSE, Base, base_with_product
from lightning_peft.kernels.shared_input import write_output_gradients

torch.library.define("lightning_peft::wide_rows", "(Tensor x, int room) -> Tensor")
torch.library.define("lightning_peft::fill_edge", "(Tensor(a!) wide, Tensor stack, float scaling) -> Tensor")
torch.library.define(
    "lightning_peft::inside_products",
    "(Tensor x, Tensor[] beside, Tensor?[] codes, Tensor?[] biases, str form, int block_size) -> Tensor[]",
)
torch.library.define(
    "lightning_peft::fill_gradient_edge",
    "(Tensor(a!) wide, Tensor[] others, int place, Tensor[] factors, Tensor inner, float scaling) -> Tensor",
)
torch.library.define(
    "lightning_peft::inside_gradient",
    "(Tensor wide, Tensor below, Tensor[] others, int place, Tensor?[] weights, str form, int block_size) -> Tensor",
)
torch.library.define("lightning_peft::copy_matrices", "(Tensor[] sources, Tensor(a!)[] into) -> ()")

ROW_UNIT = 64
"""Numbers that wider rows are a multiple of: torch's compiler begins rows of 16 bits at whole 128 bytes, and products
take so many columns at a time."""


def room_for(features: int, ranks: Sequence[int]) -> int:
    """Return the room behind so many features that factors of these ranks take."""
    return -(-(features + sum(ranks)) // ROW_UNIT) * ROW_UNIT - features


class Edges(NamedTuple):
    """Factors of a group of layers where its products want them, beside and below the weights.

    For dense layers `beside` and `below` are the weights with their room, for coded ones the room alone; it is zero
    where no factor fills it. The rest are views into them.
    """

    place: int
    """The layer whose weight has all A below it."""
    below: Tensor
    """(out + room, in) of that layer, or (room, in)."""
    stack: Tensor
    """All A below each other, (sum of R_i, in)."""
    beside: tuple[Tensor, ...]
    """(out_i, in + room), or (out_i, room); none where the input is not made in wider rows."""
    factors: tuple[Tensor, ...]
    """Each B, (out_i, R_i); tensors of their own where there is nothing beside the weights."""


def add_low_rank_inside(
    bases: Sequence[Base], edges: Edges, x: Tensor, factors: Sequence[tuple[Tensor, Tensor]], scaling: float
) -> tuple[Tensor, ...]:
    """Return base_i + scaling * x A_i^T B_i^T of every layer, (..., out_i).

    x, the weights, or what they are decoded to, and the edges, which hold the factors, have one dtype.
    """
    A, B = zip(*factors, strict=True)
    frozen = [tensor for base in bases for tensor in base.tensors]
    numbers = len(bases), len(edges.beside), edges.place, scaling
    parts = edges.below, edges.stack, *edges.factors, *edges.beside
    return InsideProduct.apply(x, *numbers, *bases[0][:3], *A, *B, *parts, *frozen)


class InsideProduct(torch.autograd.Function):
    """base_i + scaling * x A_i^T B_i^T for every i. Keeps x once, and the (N, R) products of all."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        count: int,
        wide: int,
        place: int,
        scaling: float,
        dtype: torch.dtype,
        form: str,
        block_size: int,
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        A, B, (below, stack) = tensors[:count], tensors[count : 2 * count], tensors[2 * count : 2 * count + 2]
        rest = tensors[2 * count + 2 :]
        factors, beside, frozen = rest[:count], rest[count : count + wide], rest[count + wide :]
        width = len(frozen) // count
        own = [frozen[start : start + width] for start in range(0, len(frozen), width)]
        weights = [tensor for layer in own for tensor in layer[:-1]]
        ranks = [len(factor) for factor in A]
        if wide:
            room = beside[0].shape[1] - (x.shape[-1] if form == DENSE else 0)
            wide_x = torch.ops.lightning_peft.wide_rows(x, room)
            inner = torch.ops.lightning_peft.fill_edge(wide_x, stack, scaling)
            biases, codes = [layer[-1] for layer in own], [] if form == DENSE else weights
            outputs = torch.ops.lightning_peft.inside_products(wide_x, beside, codes, biases, form, block_size)
        else:
            inner = torch.ops.lightning_peft.scaled_products([x.reshape(-1, x.shape[-1])], [stack.t()], scaling)
            outputs = [
                base_with_product(x, Base(dtype, form, block_size, tuple(layer)), part, factor)
                for layer, part, factor in zip(own, inner.split(ranks, 1), factors, strict=True)
            ]
        ctx.save_for_backward(x, inner, below, *factors, *weights)
        ctx.count, ctx.place, ctx.scaling, ctx.form = count, place, scaling, (form, block_size)
        ctx.ranks, ctx.factor_dtypes = ranks, (A[0].dtype, B[0].dtype)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, below, *rest = ctx.saved_tensors
        place, factors, weights = ctx.place, rest[: ctx.count], rest[ctx.count :]
        dtype_A, dtype_B = ctx.factor_dtypes
        size, rank = len(factors[place]), sum(ctx.ranks)
        room = len(below) - (size if ctx.form[0] == DENSE else 0)
        grad = grads[place]
        wide_grad = torch.ops.lightning_peft.wide_rows(grad, room)
        others = [own.reshape(-1, own.shape[-1]) for own in (*grads[:place], *grads[place + 1 :])]
        sums = torch.ops.lightning_peft.fill_gradient_edge(wide_grad, others, place, factors, inner, ctx.scaling)
        parts = sums.split([factor.numel() for factor in factors])
        grad_B = [part.view(factor.shape).to(dtype_B) for part, factor in zip(parts, factors, strict=True)]
        edge = wide_grad.view(-1, size + room)[:, size : size + rank]
        x_rows = x.reshape(-1, x.shape[-1])
        grad_A = torch.ops.lightning_peft.factor_gradient(edge, x_rows).to(dtype_A).split(ctx.ranks)
        grad_x = None
        if ctx.needs_input_grad[0]:
            x_shape = x.shape
            del x, x_rows  # they are large, and x's gradient is about to be made
            options = others, place, weights, *ctx.form
            grad_x = torch.ops.lightning_peft.inside_gradient(wide_grad, below, *options).view(x_shape)
        nothing = (None,) * (len(ctx.needs_input_grad) - 8 - 2 * ctx.count)
        return grad_x, *(None,) * 7, *grad_A, *grad_B, *nothing


@torch.library.impl("lightning_peft::wide_rows", "CompositeExplicitAutograd")
def wide_rows(x: Tensor, room: int) -> Tensor:
    """Return x (..., width) in rows of (..., width + room), zero behind it: a copy, but for torch's compiler.

    See `write_into_wide_rows`.
    """
    return torch.cat([x, x.new_zeros(*x.shape[:-1], room)], -1)


@torch.library.register_fake("lightning_peft::wide_rows")
def _(x: Tensor, room: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] + room)


@cache
def write_into_wide_rows() -> None:
    """Have torch's compiler let what makes a tensor write it into the wider rows of `wide_rows`.

    It does so for `cat` too, but for inputs that one kernel could copy, and it makes them anew there: gate's gradient
    beside up's, or a norm beside its sum.
    """
    from torch._inductor import ir, lowering  # slow, and only a compiled run has it

    def wide(x: Any, room: int) -> Any:
        size = [*x.get_size()[:-1], room]
        edge = lowering.full(size, 0.0, dtype=x.get_dtype(), device=x.get_device())
        return ir.TensorBox(ir.ConcatKernel.create([x, edge], len(size) - 1))

    lowering.register_lowering(torch.ops.lightning_peft.wide_rows.default, type_promotion_kind=None)(wide)


@torch.library.impl("lightning_peft::fill_edge", "CompositeExplicitAutograd")
def fill_edge(wide: Tensor, stack: Tensor, scaling: float) -> Tensor:
    """Return scaling * x A^T, (N, R), for A (R, in), and write it behind x in wide rows (..., in + room)."""
    rows = wide.view(-1, wide.shape[-1])
    rank, in_features = stack.shape
    x = rows[:, :in_features]
    inner = x.new_empty(len(x), rank)
    inner.addmm_(x, stack.t(), beta=0, alpha=scaling)  # the product applies the factor by itself
    rows[:, in_features : in_features + rank].copy_(inner)
    return inner


@torch.library.register_fake("lightning_peft::fill_edge")
def _(wide: Tensor, stack: Tensor, scaling: float) -> Tensor:
    return wide.new_empty(wide.numel() // wide.shape[-1], len(stack))


def _own(codes: list[Tensor | None], count: int) -> list[Codes]:
    """Return the codes of every layer."""
    width = len(codes) // count
    return [Codes(*codes[start : start + width]) for start in range(0, len(codes), width)]  # type: ignore[arg-type]


@torch.library.impl("lightning_peft::inside_products", "CompositeExplicitAutograd")
def inside_products(
    x: Tensor, beside: list[Tensor], codes: list[Tensor | None], biases: list[Tensor | None], form: str, block_size: int
) -> list[Tensor]:
    """Return [x | inner] [W_i | B_i]^T + bias_i, (..., out_i), of each, for x (..., in + room).

    `beside` is (out_i, in + room), or B_i alone, (out_i, room), where there are codes: one dense weight exists at a
    time.
    """
    outputs = [x.new_empty(*x.shape[:-1], len(own)) for own in beside]
    rows = x.view(-1, x.shape[-1])
    for place, (output, own, bias) in enumerate(zip(outputs, beside, biases, strict=True)):
        weight = own
        if form != DENSE:
            weight = dequantize_with_edge(_own(codes, len(beside))[place], form, block_size, own, below=False)
        into = output.view(-1, len(own))
        if bias is None:
            torch.mm(rows, weight.t(), out=into)
        else:
            torch.addmm(bias.to(x.dtype), rows, weight.t(), out=into)
        del weight
    return outputs


@torch.library.register_fake("lightning_peft::inside_products")
def _(x: Tensor, beside: list[Tensor], *_: Any) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], len(own)) for own in beside]


@torch.library.impl("lightning_peft::fill_gradient_edge", "CompositeExplicitAutograd")
def fill_gradient_edge(
    wide: Tensor, others: list[Tensor], place: int, factors: list[Tensor], inner: Tensor, scaling: float
) -> Tensor:
    """Write scaling * g_i B_i of every i beside each other behind the gradient in wide rows, (..., out + room).

    Return each g_i^T inner_i, (out_i, R_i), one behind the other in at least fp32. The wide rows are g of `place`, the
    others (N, out_i); B_i is (out_i, R_i), inner (N, sum of R_i).
    """
    rows = wide.view(-1, wide.shape[-1])
    size = len(factors[place])
    grads = [*others[:place], rows[:, :size], *others[place:]]
    return write_output_gradients(grads, factors, inner, scaling, rows[:, size : size + inner.shape[1]])


@torch.library.register_fake("lightning_peft::fill_gradient_edge")
def _(wide: Tensor, others: list[Tensor], place: int, factors: list[Tensor], inner: Tensor, scaling: float) -> Tensor:
    dtype = torch.promote_types(inner.dtype, torch.float32)
    return inner.new_empty(sum(factor.numel() for factor in factors), dtype=dtype)


@torch.library.impl("lightning_peft::inside_gradient", "CompositeExplicitAutograd")
def inside_gradient(
    wide: Tensor, below: Tensor, others: list[Tensor], place: int, weights: list[Tensor | None], form: str,
    block_size: int,
) -> Tensor:  # fmt: skip
    """Return the sum of g_i W_i and of the changes' part, (N, in), for the gradient of `place` in wide rows.

    `weights` has each layer's weight, or its codes; `below` is (out + room, in) of `place`, or all A, (room, in), where
    there are codes. The product that the changes are in comes last: what was rounded before is the frozen layers'.
    """
    count, rows = len(others) + 1, wide.view(-1, wide.shape[-1])
    result = rows.new_empty(len(rows), below.shape[1])
    order = [own for own in range(count) if own != place]
    for turn, (own, grad) in enumerate(zip((*order, place), (*others, rows), strict=True)):
        if form == DENSE:
            weight = below if own == place else weights[own]
        elif own == place:
            weight = dequantize_with_edge(_own(weights, count)[own], form, block_size, below, below=True)
        else:
            weight = dequantize(_own(weights, count)[own], form, block_size, wide.dtype)
        assert weight is not None
        result.addmm_(grad, weight, beta=1 if turn else 0)
        del weight
    return result


@torch.library.register_fake("lightning_peft::inside_gradient")
def _(wide: Tensor, below: Tensor, *_: Any) -> Tensor:
    return wide.new_empty(wide.numel() // wide.shape[-1], below.shape[1])


@torch.library.impl("lightning_peft::copy_matrices", "CUDA")
def _copy_matrices(sources: list[Tensor], into: list[Tensor]) -> None:
    from lightning_peft.kernels.triton_copies import copy_matrices  # Triton is there where CUDA is

    copy_matrices(sources, into)


@torch.library.register_fake("lightning_peft::copy_matrices")
def _(sources: list[Tensor], into: list[Tensor]) -> None:
    pass


def copy_together(sources: Sequence[Tensor], into: Sequence[Tensor]) -> None:
    """Copy and cast every source over its place, on CUDA in one launch wherever the places lie."""
    lie_alike = all(place.is_contiguous() for place in into)
    if lie_alike or not into[0].is_cuda or not has_triton():
        torch._foreach_copy_(list(into), list(sources))
    else:
        torch.ops.lightning_peft.copy_matrices([source.contiguous() for source in sources], list(into))
