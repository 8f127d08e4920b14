"""Weights in the few-bit numbers that checkpoints are published in: integers with zero points, FP8 and FP4.

Whatever the layout of a checkpoint, a weight is held the same way: rows of codes that are the rows of W, a scale for
each group of neighbouring columns, and for integers the code that stands for zero. A value is (code - zero) times
scale, computed in fp32 and rounded once.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_WEIGHTS = {"cpu": 2**18, "cuda": 2**26}
"""Weights dequantised at once by device, as `codes.CHUNK_WEIGHTS`: twelve bytes of temporaries a weight."""


class Storage(NamedTuple):
    """The layout in bytes of the codes of a kind."""

    per_byte: int
    """Codes in a byte, the first column's in the highest bits."""
    values: Callable[[Tensor], Tensor]
    """Make of bytes (rows, columns / per_byte) the numbers (rows, columns) they stand for, fp32 before the scale."""


def _integers(bits: int) -> Callable[[Tensor], Tensor]:
    return lambda codes: unpacked(codes, bits).float()


@cache
def _e2m1(device: torch.device) -> Tensor:
    """Return the sixteen values of FP4, (16,) fp32: one bit of sign, two of exponent, one of mantissa (OCP MX 1.0)."""
    sizes = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    return torch.tensor([*sizes, *(-size for size in sizes)], device=device)


LOW_BIT = {
    "uint2": Storage(4, _integers(2)),
    "uint4": Storage(2, _integers(4)),
    "uint8": Storage(1, _integers(8)),
    "fp8": Storage(1, lambda codes: codes.view(torch.float8_e4m3fn).float()),
    "mxfp4": Storage(2, lambda codes: _e2m1(codes.device)[unpacked(codes, 4).int()]),
}
"""Kinds of codes by name: unsigned integers, e4m3 and e2m1."""


def unpacked(codes: Tensor, bits: int) -> Tensor:
    """Return the codes (rows, columns) uint8 out of bytes (rows, columns * bits / 8)."""
    if bits == 8:
        return codes
    places = [(codes >> shift) & (2**bits - 1) for shift in range(8 - bits, -1, -bits)]
    return torch.stack(places, dim=-1).flatten(-2)


def packed(codes: Tensor, bits: int) -> Tensor:
    """Return bytes (..., columns * bits / 8) that hold codes (..., columns) uint8 below 2^bits."""
    if bits == 8:
        return codes
    places = codes.unflatten(-1, (-1, 8 // bits))
    byte = places[..., 0]
    for place in places.unbind(-1)[1:]:
        byte = (byte << bits) | place
    return byte.contiguous()


@torch.no_grad()
def dequantize_low_bit(
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    groups: Tensor | None,
    kind: str,
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the dense (out, in) weight of codes of a kind of `LOW_BIT`.

    Scales (out, groups of columns) have any float dtype, or are the exponents of powers of two in uint8 (E8M0); with
    fewer rows than the weight, one holds for `block_size` rows too. A group is `block_size` neighbouring columns, or
    the columns that `groups` (in,) gives its number. Zeros are (out, groups of columns) uint8.
    """
    storage = LOW_BIT[kind]
    rows, columns = weight.shape[0], weight.shape[1] * storage.per_byte
    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    is_even = groups is None and columns % block_size == 0
    if groups is None and not is_even:
        groups = torch.arange(columns, device=weight.device) // block_size
    dense = weight.new_empty(rows, columns, dtype=dtype)
    step = max(1, CHUNK_WEIGHTS.get(weight.device.type, CHUNK_WEIGHTS["cuda"]) // max(columns, 1))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        if scales.shape[0] == rows:
            scale = scales[start:stop].float()
        else:
            scale = scales.float()[torch.arange(start, stop, device=weight.device) // block_size]
        values = storage.values(weight[start:stop])
        parts = values.view(stop - start, -1, block_size) if is_even else values

        def laid_out(of_groups: Tensor) -> Tensor:
            return of_groups[..., None] if is_even else of_groups[:, groups]

        if zeros is not None:
            parts.sub_(laid_out(zeros[start:stop]))
        dense[start:stop] = parts.mul_(laid_out(scale)).view_as(values)
    return dense
