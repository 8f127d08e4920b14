"""The limits of an adapter on weights published in few bits: it changes them from beside and never writes them."""

from lightning_peft.adapters.base import AdapterConfig
from lightning_peft.adapters.initialization import Reads
from lightning_peft.adapters.registry import METHODS
from lightning_peft.quantization.config import QuantizationConfig
from lightning_peft.quantization.published.format import PublishedFormat
from lightning_peft.quantization.published.registry import check_not_requantised


def check_fits_published(form: PublishedFormat, adapter: AdapterConfig, quantization: QuantizationConfig) -> None:
    """Raise ValueError for options that would have to write other weights into a checkpoint of that format."""
    check_not_requantised(form, quantization)
    if METHODS[adapter.method].trains_all:
        raise ValueError(
            f"method={adapter.method} trains the weights of the base, and the checkpoint's are {form.describe()}; use "
            "method=lora, or give the original model"
        )
    init = adapter.initialization
    if init.rewrites_base or init.reads is Reads.quantisation_error:
        raise ValueError(
            f"adapter.init={adapter.init_name} rewrites the base or makes up for its rounding, and the checkpoint's "
            f"weights are {form.describe()}; use adapter.init=kaiming, or give the original model"
        )
