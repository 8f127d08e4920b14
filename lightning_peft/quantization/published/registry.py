"""The published formats that are read, by the word that config.json has for them."""

from collections.abc import Mapping
from typing import Any

from lightning_peft.quantization.config import QuantizationConfig
from lightning_peft.quantization.published.awq import AWQ
from lightning_peft.quantization.published.compressed_tensors import CompressedTensors
from lightning_peft.quantization.published.format import PublishedFormat
from lightning_peft.quantization.published.fp8 import FP8
from lightning_peft.quantization.published.gptq import GPTQ
from lightning_peft.quantization.published.mxfp4 import MXFP4

FORMATS: dict[str, type[PublishedFormat]] = {
    "fp8": FP8,
    "fbgemm_fp8": FP8,
    "gptq": GPTQ,
    "awq": AWQ,
    "compressed-tensors": CompressedTensors,
    "mxfp4": MXFP4,
}
"""`quant_method` of config.json to the format."""


def published_format(options: Mapping[str, Any] | None) -> PublishedFormat | None:
    """Return the format that a `quantization_config` describes; None without one, and for bitsandbytes' own.

    Raises ValueError for one that is not read.
    """
    method = None if options is None else options.get("quant_method")
    if options is None or method in (None, "bitsandbytes"):
        if options is not None and options.get("load_in_8bit"):
            raise ValueError(
                "quantization_config of config.json: load_in_8bit of bitsandbytes is not read; give the original model "
                "with quantization=int8"
            )
        return None
    if method not in FORMATS:
        raise ValueError(
            f"weights quantised by {method} cannot be trained here; give the original, or one quantised by "
            f"{', '.join(FORMATS)}"
        )
    try:
        return FORMATS[method](options)
    except ValueError as error:
        raise ValueError(f"quantization_config of config.json: {error}; give the original model") from error


def check_not_requantised(form: PublishedFormat, quantization: QuantizationConfig | None) -> None:
    """Raise ValueError where another quantisation is asked for than the checkpoint has."""
    if quantization is not None and quantization.is_on:
        raise ValueError(
            f"quantization.kind={quantization.kind.name}: the checkpoint is {form.describe()} and stays so; use "
            "quantization=none (method=lora in place of qlora), or give the original model"
        )
