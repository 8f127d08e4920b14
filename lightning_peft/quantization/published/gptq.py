"""GPTQ weights (Frantar et al. 2022, arXiv:2210.17323) as AutoGPTQ and GPTQModel write them."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_peft.kernels.codes import Codes
from lightning_peft.kernels.low_bit import packed
from lightning_peft.quantization.published.format import (
    NAMED,
    LowBitWeight,
    PublishedFormat,
    empty_weight,
    even_groups,
    from_words,
)

WRITTEN = ("gptq", "gptq_v2")
"""Layouts that are read: the first holds every zero less one, wrapped around."""


class GPTQ(PublishedFormat):
    """quant_method gptq: integers of 2, 3, 4 or 8 bits, packed along the inputs, zeros along the outputs.

    With `desc_act` each column names its group.
    """

    weight = ".weight"
    markers = (".qweight",)
    parts = (".qweight", ".qzeros", ".scales", ".g_idx")
    optional = (".g_idx",)

    def __init__(self, options: Mapping[str, Any]):
        super().__init__(options)
        self.bits = int(options.get("bits", 4))
        if self.bits not in NAMED:
            raise ValueError(f"bits={self.bits} of gptq is not read, only 2, 3, 4 and 8")
        self.written = str(options.get("checkpoint_format") or options.get("format") or "gptq").lower()
        if self.written not in WRITTEN:
            raise ValueError(f"checkpoint_format={self.written} of gptq is not read, only gptq and gptq_v2")
        if other := [key for key in options.get("dynamic") or {} if not key.startswith("-")]:
            raise ValueError(f"dynamic={other[0]} of gptq gives layers bits of their own, which is not read")
        self.group_size = int(options.get("group_size", 128))

    def describe(self) -> str:
        order = ", groups by activation order" if self.options.get("desc_act") else ""
        return f"GPTQ of {self.bits} bits in groups of {self.group_size}{order}"

    def layout(self, name: str, rows: int, columns: int) -> LowBitWeight:
        size = columns if self.group_size == -1 else self.group_size
        groups = bool(self.options.get("desc_act")) and size < columns
        return empty_weight(NAMED[self.bits], (rows, columns), size, torch.float16, None, True, groups)

    def read(self, name: str, parts: Mapping[str, Tensor]) -> LowBitWeight:
        scales = parts[".scales"].t().contiguous()
        rows = scales.shape[0]
        words = parts[".qweight"]
        columns = words.shape[0] * 32 // self.bits
        size = columns if self.group_size == -1 else self.group_size
        if words.shape[1] != rows or scales.shape[1] != math.ceil(columns / size):
            raise ValueError(
                f"{name} is not GPTQ of {self.bits} bits in groups of {size}: the shapes of its parts differ"
            )
        zeros = from_words(parts[".qzeros"].t(), self.bits)[:rows]
        if self.written == "gptq":
            zeros = (zeros + 1) & (2**self.bits - 1)
        groups = parts.get(".g_idx")
        if even_groups(groups, size):
            groups = None
        integers = from_words(words, self.bits).t().contiguous()
        held = 4 if self.bits == 3 else self.bits
        codes = Codes(packed(integers, held), scales, zeros.contiguous(), groups)
        return LowBitWeight(NAMED[self.bits], size, codes)

    def skipped(self) -> list[str]:
        never = [f"re:{key.removeprefix('-:')}" for key in self.options.get("dynamic") or {} if key.startswith("-")]
        return [*never, *(self.options.get("modules_to_not_convert") or ())]
