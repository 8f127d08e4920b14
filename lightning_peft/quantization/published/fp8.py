"""FP8 weights (e4m3) with a scale for each block, row or tensor, as DeepSeek V3 and Qwen 3 are published."""

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_peft.kernels.codes import Codes
from lightning_peft.quantization.published.format import LowBitWeight, PublishedFormat, empty_weight


class FP8(PublishedFormat):
    """quant_method fp8 (blocks of `weight_block_size`, else a scale a tensor) and fbgemm_fp8 (a scale a row)."""

    weight = ""
    markers = ("_scale_inv", "_scale")
    parts = ("", "_scale_inv", "_scale")
    unused = (".input_scale", ".activation_scale", ".k_scale", ".v_scale", ".input_scale_ub")

    def __init__(self, options: Mapping[str, Any]):
        super().__init__(options)
        if options.get("expert_dtype", "fp8") != "fp8":
            raise ValueError(f"expert_dtype={options['expert_dtype']} of fp8 is not read")
        block = options.get("weight_block_size")
        self.block: tuple[int, int] | None = tuple(block) if block else None  # type: ignore[assignment]

    def describe(self) -> str:
        return "FP8" if self.block is None else f"FP8 in blocks of {self.block[0]} x {self.block[1]}"

    def layout(self, name: str, rows: int, columns: int) -> LowBitWeight:
        return fp8_layout(rows, columns, self.block)

    def read(self, name: str, parts: Mapping[str, Tensor]) -> LowBitWeight:
        # Both are factors: the other name says that it was the divisor's inverse when the weight was quantised.
        scale = parts["_scale_inv"] if "_scale_inv" in parts else parts["_scale"]
        return fp8_weight(name, parts[""], scale, self.block)

    def skipped(self) -> list[str]:
        return [*(self.options.get("modules_to_not_convert") or self.options.get("ignored_layers") or ())]

    def is_whole(self, parts: Collection[str]) -> bool:
        return "" in parts


def fp8_layout(rows: int, columns: int, block: tuple[int, int] | None) -> LowBitWeight:
    """Return FP8 codes without values; without blocks their scales are one a row."""
    height, width = block or (1, columns)
    scale_rows = math.ceil(rows / height) if height == width else rows
    return empty_weight("fp8", (rows, columns), width, torch.float32, scale_rows)


def fp8_weight(name: str, weight: Tensor, scale: Tensor, block: tuple[int, int] | None) -> LowBitWeight:
    """Return the codes of an FP8 weight (..., out, in) and its factors: one, or one a row or block.

    Raises ValueError for another kind of FP8, or factors of another shape.
    """
    if weight.dtype != torch.float8_e4m3fn:
        raise ValueError(f"{name} is stored as {weight.dtype}, not as float8_e4m3fn, and is not read")
    *stacked, rows, columns = weight.shape
    scale = scale.float()
    height, width = block or (1, columns)
    grid = (*stacked, math.ceil(rows / height), math.ceil(columns / width))
    if block is None and scale.numel() == 1:
        scale = scale.reshape(1).expand(grid)
    elif block is None and scale.numel() == math.prod(grid[:-1]):
        scale = scale.reshape(grid)
    elif scale.shape != grid:
        raise ValueError(f"{name} has factors of shape {tuple(scale.shape)} for a weight of {tuple(weight.shape)}")
    if height not in (1, width):
        scale = scale.repeat_interleave(height, -2)[..., :rows, :]
    return LowBitWeight("fp8", width, Codes(weight.view(torch.uint8), scale.contiguous(), None, None))
