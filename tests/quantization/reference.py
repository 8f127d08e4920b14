"""NF4, FP4 and double quantisation in plain torch, after QLoRA (arXiv:2305.14314): the oracle for the kernels."""

import torch
from torch import Tensor

NF4_LEVELS = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
"""Quantiles of the normal distribution scaled to [-1, 1], level 7 exactly zero."""

FP4_MAGNITUDES = [0.0, 0.0625 / 12, 8 / 12, 12 / 12, 4 / 12, 6 / 12, 2 / 12, 3 / 12]
FP4_LEVELS = torch.tensor(FP4_MAGNITUDES + [-magnitude for magnitude in FP4_MAGNITUDES])
"""Sign, two exponent bits, one mantissa bit; code 1 is bitsandbytes' subnormal 0.0625 / 12."""

LEVELS = {"nf4": NF4_LEVELS, "fp4": FP4_LEVELS}


def dynamic_levels() -> Tensor:
    """Return the signed dynamic 8-bit type: the midpoints of 2^i equal parts of [0.1, 1] times 10^-6 .. 1; 0, 1."""
    levels = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        means = (edges[:-1] + edges[1:]) / 2
        levels += (10.0 ** (i - 6) * means).tolist() + (-(10.0 ** (i - 6)) * means).tolist()
    return torch.tensor(sorted(levels))


def blockwise_codes(values: Tensor, levels: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Return the index of the nearest level of each value over its block's absolute maximum, and the maxima (fp32)."""
    codes, maxima = [], []
    ordered, order = levels.sort(stable=True)
    edges = (ordered[:-1] + ordered[1:]) / 2
    for block in values.flatten().float().split(block_size):
        absmax = block.abs().max()
        scaled = (block * (1 / absmax.clamp(min=1e-38))).clamp(-1, 1)
        codes.append(order[torch.bucketize(scaled, edges)])
        maxima.append(absmax)
    return torch.cat(codes), torch.stack(maxima)


def quantize(weight: Tensor, kind: str, block_size: int) -> tuple[Tensor, Tensor]:
    """Return (out, in / 2) bytes, even columns in the high half, and (out, in / block_size) absolute maxima."""
    codes, absmax = blockwise_codes(weight, LEVELS[kind], block_size)
    packed = (codes[::2] << 4 | codes[1::2]).to(torch.uint8)
    return packed.view(weight.shape[0], -1), absmax.view(weight.shape[0], -1)


def dequantize(packed: Tensor, absmax: Tensor, kind: str, block_size: int, dtype: torch.dtype) -> Tensor:
    """Return level times absolute maximum in fp32, rounded once."""
    codes = torch.stack([packed >> 4, packed & 15], dim=-1).view(packed.shape[0], -1).long()
    scales = absmax.view(packed.shape[0], -1).repeat_interleave(block_size, dim=1)
    return (LEVELS[kind][codes] * scales).to(dtype)
