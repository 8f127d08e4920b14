"""AWQ weights (Lin et al. 2023, arXiv:2306.00978) in AutoAWQ's layout for matrix products."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_peft.kernels.codes import Codes
from lightning_peft.kernels.low_bit import packed
from lightning_peft.quantization.published.format import LowBitWeight, PublishedFormat, empty_weight, from_words

PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Places in a word of the first output of eight, of the second and so on."""


class AWQ(PublishedFormat):
    """quant_method awq, version gemm: integers of 4 bits, packed along the outputs in the order of `PLACES`."""

    weight = ".weight"
    markers = (".qweight",)
    parts = (".qweight", ".qzeros", ".scales")

    def __init__(self, options: Mapping[str, Any]):
        super().__init__(options)
        version = str(options.get("version") or options.get("format") or "gemm").lower()
        if version != "gemm":
            raise ValueError(f"version={version} of awq is not read, only gemm")
        if (bits := options.get("bits", options.get("w_bit", 4))) != 4:
            raise ValueError(f"bits={bits} of awq is not read, only 4")
        self.group_size = int(options.get("group_size", options.get("q_group_size", 128)))

    def describe(self) -> str:
        return f"AWQ of 4 bits in groups of {self.group_size}"

    def layout(self, name: str, rows: int, columns: int) -> LowBitWeight:
        size = columns if self.group_size == -1 else self.group_size
        return empty_weight("uint4", (rows, columns), size, torch.float16, None, True)

    def read(self, name: str, parts: Mapping[str, Tensor]) -> LowBitWeight:
        scales = parts[".scales"].t().contiguous()
        integers, zeros = (_outputs(parts[end]) for end in (".qweight", ".qzeros"))
        rows, columns = integers.shape
        size = columns if self.group_size == -1 else self.group_size
        grid = (rows, math.ceil(columns / size))
        if scales.shape != grid or zeros.shape != grid:
            raise ValueError(f"{name} is not AWQ in groups of {size}: the shapes of its parts differ")
        return LowBitWeight("uint4", size, Codes(packed(integers, 4), scales, zeros, None))

    def skipped(self) -> list[str]:
        return [*(self.options.get("modules_to_not_convert") or ())]


def _outputs(words: Tensor) -> Tensor:
    """Return integers (out, n), contiguous, of words (n, out / 8)."""
    in_words = from_words(words.t(), 4).unflatten(0, (-1, 8))
    return in_words[:, PLACES].flatten(0, 1).contiguous()
