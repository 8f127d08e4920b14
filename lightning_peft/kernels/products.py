"""A frozen layer's product and a low-rank term in the same sums, and that term's gradients, as operators.

Compiled kernels (linear.cpp) compute them for bf16 on a processor whose fastest products AVX-512 makes, and products of
torch elsewhere. They are operators so that the compiler and the planner need not know which.
"""

import math
from ctypes import c_int, c_long
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_peft.kernels.native.library import LANES, Scratch, address, kernels, library

PANEL = 64
"""Columns of a panel, as tiles.h has it."""
MIN_ROWS = 192
"""Rows that are worth a copy of the weight. Ours."""

torch.library.define(
    "lightning_peft::low_rank_sum",
    "(Tensor x, Tensor weight, Tensor inner, Tensor factor, Tensor? gain, Tensor? bias, bool transposed) -> Tensor",
)
torch.library.define(
    "lightning_peft::low_rank_gradients",
    "(Tensor grad, Tensor x, Tensor inner, Tensor B) -> (Tensor, Tensor, Tensor)",
)

torch.library.define("lightning_peft::column_dots", "(Tensor left, Tensor right) -> Tensor")


@torch.library.impl("lightning_peft::low_rank_sum", "CompositeExplicitAutograd")
def low_rank_sum(
    x: Tensor,
    weight: Tensor,
    inner: Tensor,
    factor: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    transposed: bool,
) -> Tensor:
    """Return gain (x W + inner F) + bias, (..., out), a tensor of its own; transposed, with W^T and F^T.

    x (..., in), inner (N, R), bias (out,); weight (in, out) and factor (R, out), or (out, in) and (out, R): one dtype.
    gain (out,) fp32, or fp64 where the rest is.

    Added to a large product that was rounded before, a change below half a unit of its last place is lost: in bf16 a
    512th to a 256th, more than a young adapter changes. So the two products are added in fp32 and rounded, by the
    kernel once and with gain and bias, by torch in 16 bits after the small one was rounded and before gain and bias.
    """
    out_features = weight.shape[0 if transposed else 1]
    output = x.new_empty(*x.shape[:-1], out_features)
    rows, into = x.reshape(-1, x.shape[-1]), output.view(-1, out_features)
    if takes_sum(rows, weight, inner, transposed):
        sum_by_kernel(rows, weight, inner, factor, gain, bias, transposed, into)
        return output
    if transposed:
        weight, factor = weight.t(), factor.t()
    if x.dtype.itemsize == 2:
        # The small product comes first: what is rounded is the change, and the large one's sums in fp32 are added to
        # it. The bias comes last, or the change would be rounded beside it.
        torch.mm(inner, factor, out=into)
        scale_(into.addmm_(rows, weight), gain, None)
        return output if bias is None else output.add_(bias)
    if bias is None:
        torch.mm(rows, weight, out=into)
    else:
        torch.addmm(bias, rows, weight, out=into)
    scale_(into.addmm_(inner, factor), gain, bias)
    return output


def add_product_(rows: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor, transposed: bool = True) -> None:
    """Add x W^T + bias to output (N, out), which has the small product that comes first: see `low_rank_sum`.

    rows (N, in), weight (out, in) and bias (out,): one dtype; not transposed, x W with weight (in, out).
    """
    if takes_sum(rows, weight, rows, transposed):
        inner, factor = rows.new_empty(len(rows), 0), weight.new_empty(0)
        factor = factor.view(output.shape[1], 0) if transposed else factor.view(0, output.shape[1])
        sum_by_kernel(rows, weight, inner, factor, None, bias, transposed, output, onto=True)
        return
    output.addmm_(rows, weight.t() if transposed else weight)
    if bias is not None:
        output.add_(bias)


def scale_(rows: Tensor, gain: Tensor | None, bias: Tensor | None) -> None:
    """Multiply what is above the bias, in place."""
    if gain is not None:
        # gain is near one: gain - 1 keeps the digits that bf16 drops from gain, and is 0 at the start, to the bit.
        rows.addcmul_(rows if bias is None else rows - bias, (gain - 1).to(rows.dtype))


@torch.library.register_fake("lightning_peft::low_rank_sum")
def _(x: Tensor, weight: Tensor, inner: Tensor, factor: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.numel() // x.shape[-1])


@torch.library.impl("lightning_peft::low_rank_gradients", "CompositeExplicitAutograd")
def low_rank_gradients(grad: Tensor, x: Tensor, inner: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x A^T B^T: grad B (N, R), (grad B)^T x (R, in) and grad^T inner (out, R).

    inner is x A^T. grad (N, out), x (N, in), inner (N, R) and B (out, R) have one dtype, and so has the first; the
    others have fp32 or fp64, whichever holds it.
    """
    if takes_gradients(grad, x, inner):
        return _gradients_by_kernel(grad, x, inner, B)
    grad_inner = grad @ B
    # There are two ways to write this product; this one leaves the wide matrix as it lies.
    grad_B = summed_product(inner.t(), grad).t().contiguous()
    return grad_inner, summed_product(grad_inner.t(), x), grad_B


def summed_product(left: Tensor, right: Tensor) -> Tensor:
    """Return left right, (M, K) and (K, N), in fp32 or fp64, whichever holds it: a gradient summed over K tokens.

    On CUDA the fp32 sums are what is written; elsewhere they are rounded to the factors' dtype first.
    """
    dtype = torch.promote_types(left.dtype, torch.float32)
    if left.is_cuda and left.dtype != dtype and torch.version.hip is None and not torch.compiler.is_compiling():
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)


def padded(side: int) -> int:
    """Return the power of two that Triton computes a side of a product as: it has none below 16."""
    return max(16, 1 << (side - 1).bit_length())


@torch.library.register_fake("lightning_peft::low_rank_gradients")
def _(grad: Tensor, x: Tensor, inner: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(grad.dtype, torch.float32)
    rank = inner.shape[1]
    return (
        inner.new_empty(inner.shape), x.new_empty(rank, x.shape[1], dtype=dtype), B.new_empty(B.shape, dtype=dtype)
    )  # fmt: skip


@torch.library.impl("lightning_peft::column_dots", "CompositeExplicitAutograd")
def column_dots(left: Tensor, right: Tensor) -> Tensor:
    """Return the dot product of each pair of columns, (N, out) twice -> (out,), in at least fp32."""
    if takes_columns(left, right):
        left, right = left.contiguous(), right.contiguous()
        rows, width = left.shape
        dots, scratch = (
            left.new_empty(shape, dtype=torch.float32) for shape in ((width,), (torch.get_num_threads(), width))
        )
        kernels().column_dots(
            address(left), address(right), c_long(rows), c_int(width), address(dots), address(scratch),
            c_int(len(scratch)),
        )  # fmt: skip
        return dots
    dtype = torch.promote_types(left.dtype, torch.float32)
    return (left * right).sum(0, dtype=dtype)


@torch.library.register_fake("lightning_peft::column_dots")
def _(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(left.shape[1], dtype=torch.promote_types(left.dtype, torch.float32))


def kernels_are_fastest() -> bool:
    """Return whether AVX-512 makes this processor's fastest products of bf16: one with AMX has faster ones, torch's."""
    return library() is not None and not torch.cpu._is_amx_tile_supported()


def takes_sum(rows: Tensor, weight: Tensor, inner: Tensor, transposed: bool) -> bool:
    """Return whether the kernel computes `low_rank_sum` of these."""
    fits = rows.shape[1] % 2 == 0 and weight.shape[0 if transposed else 1] % LANES == 0 and rows.shape[0] >= MIN_ROWS
    return fits and _is_bf16_on_cpu(rows, weight) and weight.is_contiguous() and kernels_are_fastest()


def takes_gradients(grad: Tensor, x: Tensor, inner: Tensor) -> bool:
    """Return whether the kernel computes `low_rank_gradients` of these."""
    fits = grad.shape[1] % LANES == 0 and x.shape[1] % LANES == 0 and inner.shape[1] <= PANEL
    return fits and grad.shape[0] >= MIN_ROWS and _is_bf16_on_cpu(grad, x) and kernels_are_fastest()


def takes_columns(left: Tensor, right: Tensor) -> bool:
    """Return whether the kernel computes `column_dots` of these."""
    return left.shape[1] % LANES == 0 and _is_bf16_on_cpu(left, right) and library() is not None


def _is_bf16_on_cpu(*tensors: Tensor) -> bool:
    return all(x.dtype == torch.bfloat16 and x.device.type == "cpu" for x in tensors)


def parts_of(rows: int, out_features: int, threads: int) -> int:
    """Return into how many runs of rows a product is cut: every thread gets as many panels where the rows allow it."""
    panels = math.ceil(out_features / PANEL)
    return max(1, min(threads // math.gcd(panels, threads), rows // MIN_ROWS))


def sum_scratch(x: Tensor, weight: Tensor, inner: Tensor, factor: Tensor, *options: Any) -> Scratch:
    if not takes_sum(x.reshape(-1, x.shape[-1]), weight, inner, options[-1]):
        return []
    return [((torch.get_num_threads(), x.shape[-1] + inner.shape[1], PANEL), torch.bfloat16)]


def gradients_scratch(grad: Tensor, x: Tensor, inner: Tensor, B: Tensor) -> Scratch:
    if not takes_gradients(grad, x, inner):
        before_cast = [((inner.shape[1], x.shape[1]), grad.dtype)] if grad.dtype.itemsize == 2 else []
        return [(tuple(B.shape), grad.dtype), *before_cast]
    rank = math.ceil(inner.shape[1] / LANES) * LANES
    threads = torch.get_num_threads()
    sums: Scratch = [((threads, rank, features), torch.float32) for features in (x.shape[1], grad.shape[1])]
    return [*sums, ((rank, grad.shape[1]), torch.bfloat16)]


def columns_scratch(left: Tensor, right: Tensor) -> Scratch:
    if takes_columns(left, right):
        return [((torch.get_num_threads(), left.shape[1]), torch.float32)]
    return [(tuple(left.shape), left.dtype)]


def sum_by_kernel(
    rows: Tensor,
    weight: Tensor,
    inner: Tensor,
    factor: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    transposed: bool,
    into: Tensor,
    onto: bool = False,
) -> None:
    """Write `low_rank_sum` of rows (N, in) into a tensor (N, out), where `takes_sum` says that there is a kernel.

    With `onto` what is in the tensor before is added to the products.
    """
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    if inner.shape[1] % 2:
        inner = F.pad(inner, (0, 1))
        factor = F.pad(factor, (0, 1) if transposed else (0, 0, 0, 1))
    inner, factor = inner.contiguous(), factor.contiguous()
    threads = torch.get_num_threads()
    scratch = rows.new_empty(threads, rows.shape[1] + inner.shape[1], PANEL)
    gain = None if gain is None else gain.contiguous()
    bias = None if bias is None else bias.contiguous()
    assert all(x is None or x.dtype == torch.bfloat16 for x in (inner, factor, bias))
    assert gain is None or gain.dtype == torch.float32
    kernels().low_rank_sum(
        address(rows), c_long(rows.stride(0)), address(weight), address(inner), address(factor),
        address(gain), address(bias), c_int(transposed), c_int(onto), c_long(rows.shape[0]),
        c_int(rows.shape[1]), c_int(into.shape[1]), c_int(inner.shape[1]), address(into),
        c_int(parts_of(rows.shape[0], into.shape[1], threads)), address(scratch), c_int(threads),
    )  # fmt: skip


def _gradients_by_kernel(grad: Tensor, x: Tensor, inner: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grad, x, inner, B = (tensor.contiguous() for tensor in (grad, x, inner, B))
    assert inner.dtype == B.dtype == torch.bfloat16
    grad_inner = torch.empty_like(inner)
    grad_A = x.new_empty(inner.shape[1], x.shape[1], dtype=torch.float32)
    grad_B = B.new_empty(B.shape, dtype=torch.float32)
    scratch = [x.new_empty(shape, dtype=dtype) for shape, dtype in gradients_scratch(grad, x, inner, B)]
    kernels().low_rank_gradients(
        *(address(tensor) for tensor in (grad, x, inner, B)), c_long(grad.shape[0]), c_int(x.shape[1]),
        c_int(grad.shape[1]), c_int(inner.shape[1]), *(address(tensor) for tensor in (grad_inner, grad_A, grad_B)),
        *(address(tensor) for tensor in scratch), c_int(len(scratch[0])),
    )  # fmt: skip
    return grad_inner, grad_A, grad_B
