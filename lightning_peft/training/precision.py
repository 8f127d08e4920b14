"""The dtype the model computes in, decided without touching the parameters that must stay fp32."""

import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch import nn

DTYPES: dict[str, torch.dtype] = {
    "32-true": torch.float32,
    "bf16-true": torch.bfloat16,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
}
"""Values of `trainer.precision` beside auto: the dtype the forward pass computes in."""


class ComputePrecision(Precision):
    """The model runs in the dtype its frozen weights were loaded in; nothing is converted.

    Lightning's own half precision casts the whole module, and with it the fp32 adapters and quantisation scales.
    """

    def __init__(self, precision: str):
        self.precision = precision  # type: ignore[assignment]
        self.dtype = DTYPES[precision]

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module


def has_fast_bf16(accelerator: str) -> bool:
    """Return whether a device multiplies bf16 in hardware; a CPU that emulates it is ten times slower than in fp32."""
    if accelerator == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def resolve_precision(precision: str, accelerator: str, has_bf16: bool, trains_all: bool) -> str:
    """Return `auto` made concrete: bf16 where native, with fp32 weights under autocast when every weight is trained."""
    if precision == "auto":
        if has_bf16:
            return "bf16-mixed" if trains_all else "bf16-true"
        return "16-mixed" if accelerator == "cuda" else "32-true"
    if precision not in DTYPES:
        raise ValueError(f"trainer.precision={precision!r}: must be auto, {', '.join(DTYPES)}")
    if precision == "16-mixed" and accelerator != "cuda":
        raise ValueError("trainer.precision=16-mixed needs a CUDA device: use bf16-true or 32-true on a CPU")
    return precision


def precision_plugin(precision: str, accelerator: str) -> Precision:
    """Return the Lightning plugin for a concrete precision."""
    if precision.endswith("-mixed"):
        return MixedPrecision(precision, device=accelerator)  # type: ignore[arg-type]
    return ComputePrecision(precision)


def weight_dtype(precision: str, trains_all: bool) -> torch.dtype:
    """Return the dtype to load base weights in: fp32 only where they are trained under autocast, or computed in."""
    return torch.float32 if trains_all and precision.endswith("-mixed") else DTYPES[precision]
