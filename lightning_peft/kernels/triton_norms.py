"""Row norms of W + scaling * B A in one pass over W: a kernel of Triton, for DoRA (arXiv:2402.09353, eq. 5).

The sum is formed tile by tile and leaves no trace: torch would write B A, or copy W to fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, RANK = 32, 128, 16
"""The tile of W that a program has in its registers, and of the rank at a time: so many fit at any rank."""
LEAST = torch.finfo(torch.float32).tiny
"""A row of zeros has a norm that can be divided by."""


@triton.jit
def _row_norms(
    weight, A, B, norms, rows, width, rank, row_stride, column_stride, scaling, least,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    squares = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS).to(tl.int64)
        in_width = column < width
        source = weight + row[:, None] * row_stride + column[None, :] * column_stride
        tile = tl.load(source, mask=in_rows[:, None] & in_width[None, :], other=0.0).to(tl.float32)
        for first in range(0, rank, RANK):
            place = first + tl.arange(0, RANK)
            in_rank = place < rank
            own_B = tl.load(
                B + row[:, None] * rank + place[None, :], mask=in_rows[:, None] & in_rank[None, :], other=0.0
            )
            own_A = tl.load(
                A + place[:, None] * width + column[None, :], mask=in_rank[:, None] & in_width[None, :], other=0.0
            )
            tile += tl.dot(scaling * own_B, own_A, input_precision="tf32x3")
        squares += tile * tile
    total = tl.maximum(tl.sum(squares, 1), least)
    tl.store(norms + row, tl.sqrt(total), mask=in_rows)


def row_norms(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Return the row norms, (out,) fp32, of W + scaling * B A.

    W (out, in) has any strides and any floating dtype; A (R, in) and B (out, R) are fp32.
    """
    (rows, width), rank = weight.shape, len(A)
    norms = A.new_empty(rows)
    _row_norms[(triton.cdiv(rows, ROWS),)](
        weight, A.contiguous(), B.contiguous(), norms, rows, width, rank, weight.stride(0), weight.stride(1), scaling,
        LEAST, ROWS=ROWS, COLUMNS=COLUMNS, RANK=RANK, num_warps=4,
    )  # fmt: skip
    return norms
