"""MoLF-Efficient: two LoRAs of unlike rank beside each layer, of which the optimiser moves one (Tang et al. 2026).

arXiv:2605.07111; the equations are those of the authors' code (11785T23/molf, branch molf-e). The routing is the
optimiser's: optim/routed_adamw.py.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter, AdapterConfig, LowRank, Target
from lightning_peft.adapters.initialization import kaiming
from lightning_peft.adapters.lora import PEFT
from lightning_peft.adapters.method import Contract, Method, linears, only_written
from lightning_peft.quantization.weights import linear_shape


@dataclass
class MoLFEConfig(AdapterConfig):
    method: str = "molf_e"
    rank: int | None = None
    expert_ranks: list[int] = field(default_factory=lambda: [8, 128])
    """Rank of each LoRA of a layer; the authors' run has 8 and 128."""
    expert_alpha: float = 32.0
    """Numerator of the scaling alpha / sqrt(rank) of each."""
    dropout: float = 0.0
    """Probability of dropping an input of A."""

    uses_rank: ClassVar[bool] = False
    uses_alpha: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.expert_ranks) < self.least_experts or min(self.expert_ranks) < 1:
            raise ValueError(
                f"adapter.expert_ranks={self.expert_ranks}: must be {self.least_experts} or more ranks of at least 1"
            )
        if not self.expert_alpha > 0:
            raise ValueError(f"adapter.expert_alpha={self.expert_alpha}: must be above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"adapter.dropout={self.dropout}: must be in [0, 1)")

    @property
    def least_experts(self) -> int:
        """Return how many LoRAs there have to be for a choice."""
        return 2


class MoLFELinear(Adapter):
    """y = W x + sum_i s_i B_i A_i dropout(x),  s_i = alpha / sqrt(r_i): every expert runs, and has its exact gradient.

    `lora_A.i` (rank_i, in_features) is Kaiming-uniform, `lora_B.i` (out_features, rank_i) zero, both fp32.
    """

    scaling = 1.0
    """Scaling of the sum, whose experts have their own."""

    def __init__(self, base_layer: nn.Module, target: Target, config: MoLFEConfig):
        super().__init__(base_layer)
        out_features, in_features = linear_shape(base_layer)
        device = next(base_layer.parameters()).device
        ranks = config.expert_ranks
        self.scalings = [config.expert_alpha / rank**0.5 for rank in ranks]
        self.dropout = config.dropout
        self.lora_A = nn.ParameterList(torch.empty(rank, in_features, device=device) for rank in ranks)
        self.lora_B = nn.ParameterList(torch.empty(out_features, rank, device=device) for rank in ranks)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for A, B, scaling in zip(self.lora_A, self.lora_B, self.scalings, strict=True):
            if not A.is_meta:
                A.copy_(kaiming(A.new_empty(()).expand(B.shape[0], A.shape[1]), len(A), scaling).A)
                B.zero_()

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the experts side by side: A (sum of ranks, in_features) and B with the scalings in it."""
        return torch.cat([*self.lora_A]), torch.cat(
            [scaling * B for scaling, B in zip(self.scalings, self.lora_B, strict=True)], dim=1
        )

    def adapt(self, x: Tensor, base_output: Tensor) -> Tensor:
        dropped = F.dropout(x, self.dropout, self.training).to(base_output.dtype)
        A, B = (factor.to(dropped.dtype) for factor in self.factors())
        return base_output + dropped @ A.t() @ B.t()

    def product(self) -> tuple[Tensor, Tensor]:
        return self.factors()

    def delta_weight(self) -> Tensor:
        A, B = self.factors()
        return B.float() @ A.float()

    def low_rank(self) -> LowRank:
        A, B = (factor.detach().float() for factor in self.factors())
        return LowRank(A, B, 1.0)

    def published(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return one LoRA of the summed rank."""
        places = range(len(self.scalings))
        rest = {n: t for n, t in tensors.items() if n.rpartition(".")[0] not in ("lora_A", "lora_B")}
        A = torch.cat([tensors[f"lora_A.{i}"] for i in places])
        B = torch.cat([self.scalings[i] * tensors[f"lora_B.{i}"] for i in places], dim=1)
        return rest | {"lora_A.weight": A, "lora_B.weight": B}


METHOD = Method(
    MoLFEConfig,
    linears(MoLFELinear),
    trained=("lora_A.0", "lora_B.0", "lora_A.1", "lora_B.1"),
    change="s_1 B_1 A_1 + s_2 B_2 A_2, the optimiser moving one of them a step",
    paper="arXiv:2605.07111",
    count="sum of r_i (d + k)",
    peft=only_written(
        replace(
            PEFT,
            options={"dropout": "lora_dropout"},
            constants={**PEFT.constants, "use_rslora": False, "bias": "none"},
        )
    ),
    contract=Contract(
        options={"expert_ranks": [2, 4], "expert_alpha": 4.0}, trained=lambda t: 6 * (t.out_features + t.in_features)
    ),
)
