"""HiRA: a low-rank product that multiplies the weight element by element (Huang et al. 2025, ICLR)."""

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter, AdapterConfig, Target
from lightning_peft.adapters.method import Contract, Method, PeftSpelling, linears
from lightning_peft.kernels.frozen_linear import GIVEN, Base
from lightning_peft.kernels.hadamard import hadamard_product
from lightning_peft.quantization.weights import dense_weight, linear_shape


@dataclass
class HiRAConfig(AdapterConfig):
    method: str = "hira"
    dropout: float = 0.0
    """Probability of dropping an input."""

    uses_alpha: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise ValueError(f"adapter.dropout={self.dropout}: must be in [0, 1)")


class HiRALinear(Adapter):
    """y = W x + (W * B A) x: the change has the rank of W, not of B A. There is no scaling.

    `hira_A` (rank, in_features) is Kaiming-uniform, `hira_B` (out_features, rank) zero, both fp32.
    """

    def __init__(self, base_layer: nn.Module, target: Target, config: HiRAConfig):
        super().__init__(base_layer)
        assert target.rank is not None
        out_features, in_features = linear_shape(base_layer)
        device = next(base_layer.parameters()).device
        self.rank = rank = target.rank
        self.dropout = config.dropout
        self.hira_A = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=torch.float32))
        self.hira_B = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=torch.float32))

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.hira_A, a=math.sqrt(5))
        nn.init.zeros_(self.hira_B)

    def adapt(self, x: Tensor, base_output: Tensor) -> Tensor:
        dropped = F.dropout(x, self.dropout, self.training).to(base_output.dtype)
        return base_output + F.linear(dropped, self.delta_weight().to(dropped.dtype))

    def fused(self, x: Tensor, base: Base) -> Tensor | None:
        if base.form != GIVEN:
            return None
        dropped = F.dropout(x, self.dropout, self.training).to(base.dtype)
        return base.first + hadamard_product(dropped, self.hira_A, self.hira_B, partial(dense_weight, self.base_layer))

    def delta_weight(self) -> Tensor:
        return dense_weight(self.base_layer) * (self.hira_B @ self.hira_A)


METHOD = Method(
    HiRAConfig,
    linears(HiRALinear),
    trained=("hira_A", "hira_B"),
    change="W * (B A), element by element",
    paper="ICLR 2025",
    count="r (d + k)",
    # PEFT 0.21 has a rank_pattern for HiRA but builds every layer at `r`.
    peft=PeftSpelling("HIRA", ("hira_A", "hira_B"), {"dropout": "hira_dropout"}),
    contract=Contract(trained=lambda t: t.rank * (t.out_features + t.in_features)),
)
