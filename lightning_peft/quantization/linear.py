"""Frozen weights stored as 4-bit or 8-bit codes, and the linear layer of one."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.kernels.codes import (
    ABSMAX_BLOCK,
    INT8,
    CodedMatmul,
    Codes,
    check_blocks,
    codes_per_byte,
    quantize,
)
from lightning_peft.kernels.low_bit import LOW_BIT


class CodedWeight(nn.Module):
    """A frozen weight (..., out, in) in 4-bit codes, kind "nf4" or "fp4"   (eq. 5 and 6), or 8-bit ones, "int8".

    Kinds of `LOW_BIT` are read from published checkpoints and never made here.
    The codes and their absmax are frozen uint8 (absmax: fp32 unless quantised twice) parameters whose rows are the rows
    of W, so FSDP2 shards them like any weight; the small rest are buffers every rank keeps. Matrices of a stack are
    quantised each by itself. A layer starts without values, on the meta device by default: `load_dense_` or
    `load_codes_` fills it.
    """

    absmax_scale: Tensor | None
    absmax_offset: Tensor | None

    def __init__(
        self,
        shape: tuple[int, ...],
        kind: str,
        block_size: int,
        double_quantization: bool,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ):
        if kind not in LOW_BIT:
            import bitsandbytes  # noqa: F401  registers the kernels; slow import, see the module docstring

        super().__init__()
        *stacked, out_features, in_features = shape
        if kind == INT8:
            block_size, double_quantization = in_features, False
        if kind not in LOW_BIT and (problem := check_blocks(in_features, block_size)):
            raise ValueError(f"quantization.block_size={block_size}: {problem}")
        self.shape = shape
        self.kind = kind
        self.block_size = block_size
        self.double_quantization = double_quantization
        self.dtype = dtype or torch.get_default_dtype()
        """dtype before quantisation, which `dequantize` gives; `.to(dtype)` changes it. `forward` computes in x's."""
        blocks = math.ceil(in_features / block_size)
        columns = in_features // codes_per_byte(kind)
        self.weight = nn.Parameter(
            torch.empty(*stacked, out_features, columns, dtype=torch.uint8, device=device), requires_grad=False
        )
        absmax_dtype = torch.uint8 if double_quantization else torch.float32
        self.absmax = nn.Parameter(
            torch.empty(*stacked, out_features, blocks, dtype=absmax_dtype, device=device), requires_grad=False
        )
        scales = math.ceil(out_features * blocks / ABSMAX_BLOCK)
        self.register_buffer(
            "absmax_scale", torch.empty(*stacked, scales, device=device) if double_quantization else None
        )
        self.register_buffer("absmax_offset", torch.empty(stacked, device=device) if double_quantization else None)

    def load_dense_(self, weight: Tensor) -> None:
        """Hold the codes of a dense weight of this shape, on its device, and its dtype. Works on a meta layer."""
        if weight.shape != self.shape:
            raise ValueError(f"weight of shape {tuple(weight.shape)} for a layer of shape {self.shape}")
        if self.kind in LOW_BIT:
            raise RuntimeError(f"a layer whose {self.kind} codes were published cannot take another weight")
        self.load_codes_(self._quantize(weight))
        self.dtype = weight.dtype

    def _quantize(self, weight: Tensor) -> Codes:
        if weight.ndim == 2:
            return quantize(weight, self.kind, self.block_size, self.double_quantization)
        whole: list[Any] = []
        for index, matrix in enumerate(weight):
            one = self._quantize(matrix)
            whole = whole or [None if t is None else t.new_empty(len(weight), *t.shape) for t in one]
            for target, tensor in zip(whole, one, strict=True):
                if target is not None:
                    target[index] = tensor
        return Codes(*whole)

    def load_codes_(self, codes: Codes) -> None:
        """Hold these codes, on their device."""
        self.weight = nn.Parameter(codes.weight, requires_grad=False)
        self.absmax = nn.Parameter(codes.absmax, requires_grad=False)
        self.absmax_scale = codes.absmax_scale
        self.absmax_offset = codes.absmax_offset

    @property
    def codes(self) -> Codes:
        """Return what is stored, without copies."""
        return Codes(self.weight, self.absmax, self.absmax_scale, self.absmax_offset)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return a new dense weight in `dtype`, by default the one the layer computes in."""
        return self.dequantized(self.codes, dtype or self.dtype)

    def dequantized(self, codes: Codes, dtype: torch.dtype) -> Tensor:
        """Return the dense weight that codes of this layer stand for, wherever they are."""
        if codes.weight.ndim == 2:
            return torch.ops.lightning_peft.dequantize(*codes, self.kind, self.block_size, dtype)
        dense = codes.weight.new_empty(self.shape, dtype=dtype)
        for index in range(len(dense)):
            one = Codes(*(None if tensor is None else tensor[index] for tensor in codes))  # type: ignore[arg-type]
            dense[index] = self.dequantized(one, dtype)
        return dense

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CodedWeight":
        """Apply as every module does, but keep the fp32 statistics in a change of dtype: they decide the weight."""
        statistics = [tensor for tensor in self.codes[1:] if tensor is not None]

        def keep_statistics(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            if applied.dtype != tensor.dtype and any(tensor is kept for kept in statistics):
                return tensor.to(applied.device)
            return applied

        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(keep_statistics, recurse)

    def extra_repr(self) -> str:
        return (
            f"shape={self.shape}, kind={self.kind}, block_size={self.block_size}, "
            f"double_quantization={self.double_quantization}"
        )


class QuantizedLinear(CodedWeight):
    """y = x dequantised(W)^T + bias with W (out_features, in_features) in codes."""

    bias: nn.Parameter | None
    transposed: bool = False
    """True where the dense layer it stands for has its inputs first (GPT-2's Conv1D); the codes never have."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        kind: str = "nf4",
        block_size: int = 64,
        double_quantization: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = "meta",
    ):
        super().__init__((out_features, in_features), kind, block_size, double_quantization, dtype, device)
        self.in_features = in_features
        self.out_features = out_features
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, dtype=self.dtype, device=device)) if bias else None
        )

    @classmethod
    def from_weight(
        cls,
        weight: Tensor,
        bias: nn.Parameter | None = None,
        kind: str = "nf4",
        block_size: int = 64,
        double_quantization: bool = True,
    ) -> "QuantizedLinear":
        """Return a layer that holds the codes of a dense (out, in) weight, on its device; take the bias as it is."""
        out_features, in_features = weight.shape
        layer = cls(in_features, out_features, False, kind, block_size, double_quantization)
        layer.load_dense_(weight)
        layer.bias = bias
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features) in x's dtype, or in autocast's where that is on."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return CodedMatmul.apply(x, *self.codes, self.bias, self.kind, self.block_size)
