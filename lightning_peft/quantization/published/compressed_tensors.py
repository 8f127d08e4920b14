"""Weights of the compressed-tensors library, which llm-compressor writes: integers, packed or not, and FP8."""

import math
from collections.abc import Collection, Mapping
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
    matches_target,
)
from lightning_peft.quantization.published.fp8 import fp8_layout, fp8_weight

PACKED, PLAIN = "pack-quantized", ("int-quantized", "float-quantized", "naive-quantized")
"""Formats that are read: integers packed into words, and a number a code."""


class CompressedTensors(PublishedFormat):
    """quant_method compressed-tensors: signed integers of 2, 4 or 8 bits or FP8, by groups of layers.

    A scale stands for a tensor, a row, a group of columns or a block.
    """

    weight = ".weight"
    markers = (".weight_scale",)
    parts = (".weight_packed", ".weight", ".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx")
    unused = (".input_scale", ".input_zero_point", ".output_scale", ".output_zero_point", ".k_scale", ".v_scale",
              ".q_scale")  # fmt: skip

    def __init__(self, options: Mapping[str, Any]):
        super().__init__(options)
        sparsity = (options.get("sparsity_config") or {}).get("format", "dense")
        if sparsity != "dense":
            raise ValueError(f"sparsity_config.format={sparsity} of compressed-tensors is not read, only dense")
        if (options.get("transform_config") or {}).get("config_groups"):
            raise ValueError("transform_config of compressed-tensors, which turns activations, is not read")
        self.groups = [dict(group) for group in (options.get("config_groups") or {}).values() if group.get("weights")]
        if not self.groups:
            raise ValueError("config_groups of compressed-tensors gives no weights a form")
        for group in self.groups:
            self._check(group)

    def _check(self, group: dict[str, Any]) -> None:
        written, weights = group.get("format") or self.options.get("format"), group["weights"]
        if written != PACKED and written not in PLAIN:
            raise ValueError(f"format={written} of compressed-tensors is not read, only {PACKED}, {', '.join(PLAIN)}")
        bits, kind = weights.get("num_bits"), weights.get("type", "int")
        if (kind, bits) not in {("int", 2), ("int", 4), ("int", 8), ("float", 8)}:
            raise ValueError(f"num_bits={bits} type={kind} of compressed-tensors is not read")
        if _strategy(weights) not in ("tensor", "channel", "group", "block"):
            raise ValueError(f"strategy={weights.get('strategy')} of compressed-tensors is not read")
        if kind == "int" and _strategy(weights) == "block":
            raise ValueError("strategy=block of compressed-tensors is read for FP8 only")

    def describe(self) -> str:
        kinds = {
            f"{'FP' if g['weights'].get('type') == 'float' else 'int'}{g['weights']['num_bits']}" for g in self.groups
        }
        return f"{' and '.join(sorted(kinds))} of compressed-tensors"

    def scheme(self, name: str) -> dict[str, Any]:
        """Return what config.json says of a layer's weight: of its name first, else of its class."""
        for group in self.groups:
            if any(matches_target(target, name) for target in group.get("targets") or ()):
                return dict(group["weights"])
        for group in self.groups:
            if "Linear" in (group.get("targets") or ()):
                return dict(group["weights"])
        raise ValueError(f"{name} has a scale, and no config_groups of config.json has it among its targets")

    def layout(self, name: str, rows: int, columns: int) -> LowBitWeight:
        weights = self.scheme(name)
        if weights.get("type") == "float":
            return fp8_layout(rows, columns, _block(weights))
        size = _group_size(weights, columns)
        groups = weights.get("actorder") == "group"
        kind = NAMED[weights["num_bits"]]
        return empty_weight(kind, (rows, columns), size, torch.bfloat16, None, True, groups)

    def read(self, name: str, parts: Mapping[str, Tensor]) -> LowBitWeight:
        weights = self.scheme(name.removesuffix(".weight"))
        scale = parts[".weight_scale"]
        if weights.get("type") == "float":
            if (offset := parts.get(".weight_zero_point")) is not None and offset.float().any():
                raise ValueError(f"{name} is FP8 with zero points, which is not read")
            weight = parts[".weight"]
            return fp8_weight(name, weight, scale, _block(weights))
        bits = weights["num_bits"]
        middle = 2 ** (bits - 1)
        if ".weight_packed" in parts:
            rows, columns = (int(size) for size in parts[".weight_shape"])
            integers = from_words(parts[".weight_packed"].t(), bits)[:columns].t().contiguous()
        else:
            rows, columns = parts[".weight"].shape
            integers = (parts[".weight"].to(torch.int16) + middle).to(torch.uint8)
        size = _group_size(weights, columns)
        grid = (rows, math.ceil(columns / size))
        scale = scale.reshape(1, 1).expand(grid) if scale.numel() == 1 else scale.reshape(grid)
        zeros = parts.get(".weight_zero_point")
        if zeros is None:
            zeros = torch.full(grid, middle, dtype=torch.uint8, device=scale.device)
        elif zeros.dtype == torch.int32:
            zeros = from_words(zeros, bits)[:rows]
        else:
            zeros = (zeros.to(torch.int16) + middle).to(torch.uint8)
            zeros = zeros.reshape(1, 1).expand(grid) if zeros.numel() == 1 else zeros.reshape(grid)
        groups = parts.get(".weight_g_idx")
        if even_groups(groups, size):
            groups = None
        codes = Codes(packed(integers, bits), scale.contiguous(), zeros.contiguous(), groups)
        return LowBitWeight(NAMED[bits], size, codes)

    def skipped(self) -> list[str]:
        return [*(self.options.get("ignore") or ())]

    def is_whole(self, parts: Collection[str]) -> bool:
        packed_parts = ".weight_packed" in parts and ".weight_shape" in parts
        return (packed_parts or ".weight" in parts) and ".weight_scale" in parts


def _strategy(weights: Mapping[str, Any]) -> str:
    """Return what a scale stands for, which config.json need not say."""
    if (given := weights.get("strategy")) is not None:
        return str(given)
    size = weights.get("group_size")
    return "tensor" if size is None else "group" if size > 0 else "channel"


def _block(weights: Mapping[str, Any]) -> tuple[int, int] | None:
    strategy = _strategy(weights)
    if strategy == "group":
        return 1, weights["group_size"]
    if strategy != "block":
        return None
    structure = weights["block_structure"]
    height, width = (int(size) for size in (structure.split("x") if isinstance(structure, str) else structure))
    return height, width


def _group_size(weights: Mapping[str, Any], columns: int) -> int:
    size = weights.get("group_size") or -1
    return columns if _strategy(weights) != "group" or size == -1 else size
