"""Options of a merge."""

from dataclasses import dataclass
from enum import Enum

DTYPES = ("fp32", "bf16", "fp16")


class MergeBase(Enum):
    """The weights that the change is added to when the base is quantised."""

    dequantised = "dequantised"
    """The weights the adapter was trained on, made dense: the merged model is the adapted one but for one rounding."""
    original = "original"
    """The weights before quantisation: a third model, neither the base nor what was trained."""
    requantised = "requantised"
    """The sum in 4 bits again, in the format of bitsandbytes: small, and most of a small change is rounded away."""


@dataclass
class MergeConfig:
    """The way base and adapter become one model, and the largest distance of that model from the two."""

    max_kl: float = 0.01
    """Largest mean KL(adapter || merged) accepted, nats per token."""
    min_recovered: float | None = None
    """Smallest share of the adapter's effect on the logits that must remain; null only warns below a half."""
    base: MergeBase = MergeBase.dequantised
    """Weights of a quantised base to add to: dequantised, original or requantised."""
    dtype: str | None = None
    """fp32, bf16 or fp16; null keeps the dtype the model was loaded in."""

    def __post_init__(self) -> None:
        if not self.max_kl > 0:
            raise ValueError(f"merge.max_kl={self.max_kl}: must be above 0")
        if self.min_recovered is not None and not self.min_recovered <= 1:
            raise ValueError(f"merge.min_recovered={self.min_recovered}: must be at most 1")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"merge.dtype={self.dtype}: must be one of {', '.join(DTYPES)}, or null")
