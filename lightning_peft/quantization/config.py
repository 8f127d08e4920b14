"""The storage of the frozen base."""

from dataclasses import dataclass, field
from enum import Enum


class Kind(Enum):
    """Storage of the frozen linear weights."""

    none = "none"
    nf4 = "nf4"
    fp4 = "fp4"
    int8 = "int8"


@dataclass
class QuantizationConfig:
    """The storage of the frozen base: linear layers and stacked experts; the rest always keeps the compute dtype."""

    kind: Kind = Kind.none
    """nf4 suits normally distributed weights (QLoRA, section 3); fp4 is kept for comparison; int8 has the smallest
    error and twice the bytes. Activations are never quantised."""
    block_size: int = 64
    """Weights that share one scale, a power of two from 32 to 4096; the paper's is 64."""
    double_quantization: bool = True
    """Quantise the scales too: 4.127 bits a weight instead of 4.5 (QLoRA, section 3)."""
    exclude: list[str] = field(default_factory=list)
    """Names or globs of layers to keep dense, such as "model.layers.0.*", "gate_proj" or "experts"."""
    verify: bool = False
    """Log a hash of every dequantised weight after loading, sharding and each checkpoint, and fail if it changes."""

    def __post_init__(self) -> None:
        if self.kind is Kind.int8 and (self.double_quantization or self.block_size != 64):
            raise ValueError(
                f"quantization.block_size={self.block_size} double_quantization={self.double_quantization}: kind=int8 "
                "has one fp32 scale a row; use quantization=int8, which leaves both out"
            )
        if self.block_size not in {2**power for power in range(5, 13)}:
            raise ValueError(f"quantization.block_size={self.block_size}: must be a power of two from 32 to 4096")

    @property
    def is_on(self) -> bool:
        return self.kind is not Kind.none
