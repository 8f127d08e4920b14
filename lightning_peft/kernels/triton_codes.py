"""4-bit codes to a dense weight in one launch, doubly quantised scales included: a kernel of Triton.

bitsandbytes takes three: the scales, their offset, the weight. Its values are kept, product by product and rounded
once, so that the bits are the same. Triton comes with torch where there is CUDA.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Weights a program writes."""


@triton.jit
def _decode(
    codes, absmax, scale, offset, absmax_levels, code_levels, edge, into, width, room, parts,
    BLOCK_SIZE: tl.constexpr, ABSMAX_BLOCK: tl.constexpr, TWICE: tl.constexpr, EDGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64) // parts, tl.program_id(0).to(tl.int64) % parts
    column = part * BLOCK + tl.arange(0, BLOCK)
    place, inside = row * width + column, column < width
    byte = tl.load(codes + place // 2, mask=inside, other=0).to(tl.int32)
    code = tl.where(place % 2 == 0, byte >> 4, byte & 15)  # the even column is in the high half
    block = place // BLOCK_SIZE
    if TWICE:
        level = tl.load(absmax_levels + tl.load(absmax + block, mask=inside, other=0).to(tl.int32))
        largest = level * tl.load(scale + block // ABSMAX_BLOCK, mask=inside, other=0.0) + tl.load(offset)
    else:
        largest = tl.load(absmax + block, mask=inside, other=0.0)
    value = (tl.load(code_levels + code) * largest).to(into.dtype.element_ty)
    if EDGE:
        beyond = (column >= width) & (column < width + room)
        value = tl.where(inside, value, tl.load(edge + row * room + column - width, mask=beyond, other=0.0))
        inside = column < width + room
    tl.store(into + row * (width + room) + column, value, mask=inside)


def decode(
    codes: Tensor, absmax: Tensor, scale: Tensor | None, offset: Tensor | None, absmax_levels: Tensor,
    absmax_block: int, code_levels: Tensor, block_size: int, dtype: torch.dtype, edge: Tensor | None = None,
    below: bool = False,
) -> Tensor:  # fmt: skip
    """Return the dense weight (out, in) of codes (out, in / 2) uint8, in fp32, fp16 or bf16.

    absmax (out, in / block_size) is fp32, or codes of `absmax_levels` (256,), with a scale (fp32) for every
    `absmax_block` of them and one offset (). An edge (out, room), or (room, in) with `below`, contiguous and of that
    dtype, is written beside the weight or below it.
    """
    height, width, room = codes.shape[0], 2 * codes.shape[1], 0
    shape = [height, width]
    if edge is not None:
        room = edge.shape[not below]
        shape[not below] += room
    if below or edge is None:  # all of it is one row
        height, width, room = 1, height * width, room * width
    into = codes.new_empty(shape, dtype=dtype)
    twice = scale is not None
    unused, parts = absmax_levels, triton.cdiv(width + room, BLOCK)
    _decode[(height * parts,)](
        codes, absmax, scale if twice else unused, offset if twice else unused, absmax_levels, code_levels,
        unused if edge is None else edge, into, width, room, parts, BLOCK_SIZE=block_size, ABSMAX_BLOCK=absmax_block,
        TWICE=twice, EDGE=edge is not None, BLOCK=BLOCK,
        enable_fp_fusion=False,  # the product is rounded before the sum, as in three kernels
    )  # fmt: skip
    return into
