"""A method of one's own, in one file: every output of a frozen layer is rescaled by a trained gain.

    lightning-peft train imports=[own_method] method=row_gain model=tiny

Run it where this file lies, or with its folder on PYTHONPATH.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter, AdapterConfig, Target
from lightning_peft.adapters.method import Method, linears
from lightning_peft.adapters.registry import METHODS
from lightning_peft.quantization.weights import dense_weight, linear_shape


@dataclass
class RowGainConfig(AdapterConfig):
    method: str = "row_gain"
    rank: int | None = None
    largest: float = 0.5
    """Bound of the gain: outputs change by at most this share."""

    uses_rank: ClassVar[bool] = False
    uses_alpha: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.largest <= 1:
            raise ValueError(f"adapter.largest={self.largest}: must be above 0 and at most 1")


class RowGainLinear(Adapter):
    """y = W x + bound * tanh(gain) * (W x), gain (out_features,) starting at zero. The bias is not rescaled."""

    def __init__(self, base_layer: nn.Module, target: Target, config: RowGainConfig):
        super().__init__(base_layer)
        self.bound = config.largest
        device = next(base_layer.parameters()).device
        self.gain = nn.Parameter(torch.empty(linear_shape(base_layer)[0], device=device))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gain)

    def adapt(self, x: Tensor, base_output: Tensor) -> Tensor:
        bias = self.base_layer.bias
        product = base_output if bias is None else base_output - bias
        return base_output + (self.bound * self.gain.tanh()).to(base_output.dtype) * product

    def delta_weight(self) -> Tensor:
        return self.bound * self.gain.float().tanh()[:, None] * dense_weight(self.base_layer).float()


METHODS["row_gain"] = Method(
    RowGainConfig, linears(RowGainLinear), trained=("gain",), change="bound * tanh(gain) * W", count="d"
)
