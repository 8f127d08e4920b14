"""The gradients that low-rank changes take from their layers' outputs, each output's gradient read once: Triton.

grad B and grad^T inner read the same (N, out) gradient; as two products they read it twice, and it is the largest
tensor of a step. A program reads its columns for some rows and makes its part of both; a second kernel adds the parts,
in a fixed order, so that the same run gives the same bits.
"""

import triton
import triton.language as tl
from torch import Tensor

from lightning_peft.kernels.products import padded

ROWS = 32
"""Rows that a program reads at once: of 512 columns in 16 bits 32 KB, of which two fit into any GPU's shared memory."""
BLOCK = 1024
"""Sums that a program of the second kernel makes."""


@triton.jit
def _read_once(
    grad, B, inner, inner_parts, B_parts, rows, width, rank, own_rows,
    grad_stride, factor_stride, inner_stride, chunk_stride, row_stride, part_stride, scaling,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    chunk, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    column, place = chunk * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, RANK)
    in_width, in_rank = column < width, place < rank
    in_factor = in_width[:, None] & in_rank[None, :]
    factor = tl.load(B + column[:, None] * factor_stride + place[None, :], mask=in_factor, other=0.0)
    sums = tl.zeros((COLUMNS, RANK), dtype=tl.float32)
    for start in range(0, own_rows, ROWS):
        row = part * own_rows + start + tl.arange(0, ROWS)
        in_rows = row < rows
        read = tl.load(
            grad + row[:, None] * grad_stride + column[None, :], mask=in_rows[:, None] & in_width[None, :], other=0.0
        )
        in_part = in_rows[:, None] & in_rank[None, :]
        own = tl.load(inner + row[:, None] * inner_stride + place[None, :], mask=in_part, other=0.0)
        made = scaling * tl.dot(read, factor)
        tl.store(inner_parts + chunk * chunk_stride + row[:, None] * row_stride + place[None, :], made, mask=in_part)
        sums += tl.dot(tl.trans(read), own)
    tl.store(B_parts + part * part_stride + column[:, None] * rank + place[None, :], sums, mask=in_factor)


@triton.jit
def _add_up(
    inner_parts, B_parts, grad_inner, grad_B, chunks, parts, inner_count, B_count, rank, inner_stride, inner_programs,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    if program < inner_programs:
        place = program * BLOCK + tl.arange(0, BLOCK)
        inside = place < inner_count
        source = inner_parts + place
        for _ in range(chunks):
            total += tl.load(source, mask=inside, other=0.0)
            source += inner_count
        into = grad_inner + place // rank * inner_stride + place % rank
        tl.store(into, total.to(grad_inner.dtype.element_ty), mask=inside)
    else:
        place = (program - inner_programs) * BLOCK + tl.arange(0, BLOCK)
        inside = place < B_count
        source = B_parts + place
        for _ in range(parts):
            total += tl.load(source, mask=inside, other=0.0)
            source += B_count
        tl.store(grad_B + place, total, mask=inside)


def read_once(grad: Tensor, B: Tensor, inner: Tensor, scaling: float, inner_parts: Tensor, B_parts: Tensor) -> None:
    """Write the parts of scaling * grad B (chunks, N, R) and of grad^T inner (parts, out, R), fp32, of one layer.

    grad (N, out), B (out, R) and inner (N, R) are of one dtype of 16 bits, or fp32; their rows are contiguous.
    """
    (rows, width), rank = grad.shape, B.shape[1]
    chunks, parts = len(inner_parts), len(B_parts)
    own_rows = triton.cdiv(triton.cdiv(rows, parts), ROWS) * ROWS
    # The pipeline has one stage: with more, what is in flight leaves the registers.
    _read_once[(chunks, parts)](
        grad, B, inner, inner_parts, B_parts, rows, width, rank, own_rows,
        grad.stride(0), B.stride(0), inner.stride(0), *inner_parts.stride()[:2], B_parts.stride(0), scaling,
        COLUMNS=padded(triton.cdiv(width, chunks)), ROWS=ROWS, RANK=padded(rank), num_warps=8, num_stages=1,
    )  # fmt: skip


def add_up(inner_parts: Tensor, B_parts: Tensor, grad_inner: Tensor) -> Tensor:
    """Write the sum of the first over its parts into grad_inner (N, R), and return that of the second, fp32."""
    grad_B = B_parts.new_empty(B_parts.shape[1:])
    inner_programs = triton.cdiv(grad_inner.numel(), BLOCK)
    _add_up[(inner_programs + triton.cdiv(grad_B.numel(), BLOCK),)](
        inner_parts, B_parts, grad_inner, grad_B, len(inner_parts), len(B_parts), grad_inner.numel(), grad_B.numel(),
        grad_inner.shape[1], grad_inner.stride(0), inner_programs, BLOCK=BLOCK,
    )  # fmt: skip
    return grad_B
