"""MXFP4 experts (OCP Microscaling 1.0) as GPT-OSS is published."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_peft.kernels.codes import Codes
from lightning_peft.quantization.published.format import LowBitWeight, PublishedFormat, empty_weight

BLOCK = 32
"""Neighbouring columns that share a power of two."""


class MXFP4(PublishedFormat):
    """quant_method mxfp4: stacks of experts, blocks (experts, out, in / 32, 16) of bytes and a power of two to each.

    A byte holds two columns, the first in its low half.
    """

    weight = ""
    markers = ("_blocks", "_scales")
    parts = ("_blocks", "_scales")

    def describe(self) -> str:
        return "MXFP4"

    def layout(self, name: str, rows: int, columns: int) -> LowBitWeight:
        return empty_weight("mxfp4", (rows, columns), BLOCK, torch.uint8)

    def read(self, name: str, parts: Mapping[str, Tensor]) -> LowBitWeight:
        blocks, scales = parts["_blocks"], parts["_scales"]
        if blocks.shape[:-1] != scales.shape or blocks.shape[-1] != BLOCK // 2:
            raise ValueError(f"{name} is not MXFP4: blocks {tuple(blocks.shape)}, powers {tuple(scales.shape)}")
        swapped = (blocks << 4) | (blocks >> 4)
        return LowBitWeight("mxfp4", BLOCK, Codes(swapped.flatten(-2), scales.contiguous(), None, None))

    def skipped(self) -> list[str]:
        return [*(self.options.get("modules_to_not_convert") or ())]
