"""MiSS: one block of weights added to every group of inputs (Kang and Yin 2024, arXiv:2409.15371)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter, AdapterConfig, Target
from lightning_peft.adapters.method import Contract, Method, PeftSpelling, linears
from lightning_peft.quantization.weights import linear_shape


@dataclass
class MiSSConfig(AdapterConfig):
    method: str = "miss"
    dropout: float = 0.0
    """Probability of dropping an input."""

    uses_alpha: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise ValueError(f"adapter.dropout={self.dropout}: must be in [0, 1)")


class MiSSLinear(Adapter):
    """y = W x + D^T s,  s_i = sum of x_j over j = i (mod rank).

    D is `miss_block` (rank, out_features), fp32, zero at the start: the inputs are cut into groups of `rank` and all
    groups share D. The layer keeps (N, rank) of activations, not x.
    """

    def __init__(self, base_layer: nn.Module, target: Target, config: MiSSConfig):
        super().__init__(base_layer)
        assert target.rank is not None
        if target.rank > target.in_features:
            raise ValueError(f"adapter.rank={target.rank}: above the {target.in_features} inputs of {target.name}")
        out_features, self.in_features = linear_shape(base_layer)
        device = next(base_layer.parameters()).device
        self.rank = rank = target.rank
        self.dropout = config.dropout
        self.miss_block = nn.Parameter(torch.empty(rank, out_features, device=device, dtype=torch.float32))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.miss_block)

    def adapt(self, x: Tensor, base_output: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        padded = F.pad(x, (0, -self.in_features % self.rank))
        sums = padded.unflatten(-1, (-1, self.rank)).sum(-2).to(base_output.dtype)
        return base_output + sums @ self.miss_block.to(base_output.dtype)

    def delta_weight(self) -> Tensor:
        groups = -(-self.in_features // self.rank)
        return self.miss_block.float().t().repeat(1, groups)[:, : self.in_features]


METHOD = Method(
    MiSSConfig,
    linears(MiSSLinear),
    trained=("miss_block",),
    change="one block shared by groups of inputs",
    paper="arXiv:2409.15371",
    count="r d",
    peft=PeftSpelling(
        "MISS", ("miss_block",), {"dropout": "miss_dropout"}, constants={"bias": "none", "init_weights": True}
    ),
    contract=Contract(trained=lambda t: t.rank * t.out_features),
)
