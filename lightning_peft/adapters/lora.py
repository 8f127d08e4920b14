"""LoRA: a low-rank change beside a frozen layer (Hu et al. 2021, arXiv:2106.09685)."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter, AdapterConfig, Target
from lightning_peft.adapters.bias import Bias
from lightning_peft.adapters.init import INITS, NEED_RANK_WITHIN_LAYER
from lightning_peft.kernels.frozen_linear import Base
from lightning_peft.kernels.low_rank import add_low_rank
from lightning_peft.quantization.weights import linear_shape

Init = Enum("Init", {name: name for name in INITS})  # type: ignore[misc]
"""Names of the initialisations; an Enum so that Hydra checks them."""


@dataclass
class LoRAConfig(AdapterConfig):
    method: str = "lora"
    dropout: float = 0.0
    """Probability of dropping an input of A."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732)."""
    init: Init = Init.kaiming  # type: ignore[attr-defined]
    """How A and B start."""
    bias: Bias = Bias.none
    """Biases of the base trained as well: none, all, or lora_only for those of the adapted layers."""
    eva_rho: float = 2.0
    """With init=eva, the most a layer's rank may grow when ranks go where they explain most; 1 keeps them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise ValueError(f"adapter.dropout={self.dropout}: must be in [0, 1)")
        if self.eva_rho < 1:
            raise ValueError(f"adapter.eva_rho={self.eva_rho}: must be at least 1")

    @property
    def rank_within_layer(self) -> bool:
        return self.init.name in NEED_RANK_WITHIN_LAYER

    def layer_options(self, target: Target) -> dict[str, Any]:
        return {
            "rank": target.rank,
            "alpha": target.alpha,
            "dropout": self.dropout,
            "rank_stabilized": self.rank_stabilized,
            "init": self.init.name,
        }


class LoRALinear(Adapter):
    """y = W x + scaling * B A dropout(x),  scaling = alpha / rank   (eq. 3 and section 4.1).

    A is (rank, in_features), B is (out_features, rank), both fp32 whatever the base computes in. With the default
    init A is Kaiming-uniform and B zero, so the layer starts as its base. Wraps nn.Linear, its quantised counterpart
    and GPT-2's Conv1D.
    """

    initial_A: Tensor | None
    initial_B: Tensor | None
    """A and B at the start, when the initialisation took them out of the base weight."""

    def __init__(
        self,
        base_layer: nn.Module,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        rank_stabilized: bool = False,
        init: str = "kaiming",
    ):
        super().__init__(base_layer)
        out_features, in_features = linear_shape(base_layer)
        device = next(base_layer.parameters()).device
        self.rank = rank
        self.scaling = alpha / rank**0.5 if rank_stabilized else alpha / rank
        self.dropout = dropout
        self.init = init
        self.lora_A = nn.Linear(in_features, rank, bias=False, device=device, dtype=torch.float32)
        self.lora_B = nn.Linear(rank, out_features, bias=False, device=device, dtype=torch.float32)
        self.register_buffer("initial_A", None, persistent=False)
        self.register_buffer("initial_B", None, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if not self.lora_A.weight.is_meta:
            INITS[self.init](self)

    @torch.no_grad()
    def set_factors(self, A: Tensor, B: Tensor) -> None:
        """Take these values of A (rank, in_features) and B (out_features, rank); another rank keeps the scaling."""
        if A.shape[0] != self.rank:
            self.rank = self.lora_A.out_features = self.lora_B.in_features = A.shape[0]
            self.lora_A.weight = nn.Parameter(torch.empty(A.shape, device=A.device))
            self.lora_B.weight = nn.Parameter(torch.empty(B.shape, device=B.device))
        self.lora_A.weight.copy_(A)
        self.lora_B.weight.copy_(B)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A (rank, in_features) and B (out_features, rank), as the products take them."""
        return self.lora_A.weight, self.lora_B.weight

    def adapt(self, x: Tensor, base_output: Tensor) -> Tensor:
        dropped = F.dropout(x, self.dropout, self.training)
        return base_output + self.low_rank_output(dropped.to(base_output.dtype))

    def low_rank_output(self, x: Tensor) -> Tensor:
        """Return scaling * B A x, in the dtype of x."""
        A, B = (factor.to(x.dtype) for factor in self.factors())
        return self.scaling * (x @ A.t() @ B.t())

    def fused(self, x: Tensor, base: Base) -> Tensor | None:
        return add_low_rank(base, x, *self.factors(), self.scaling, self.active_dropout)

    def delta_weight(self) -> Tensor:
        return self.scaling * (self.lora_B.weight.float() @ self.lora_A.weight.float())


class LoRAEmbedding(Adapter):
    """y = W[id] + scaling * B A[:, id]   around an embedding (reference code of the paper).

    lora_embedding_A is (rank, num_embeddings), zero; lora_embedding_B is (dim, rank), standard normal.
    """

    def __init__(
        self,
        base_layer: nn.Embedding,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        rank_stabilized: bool = False,
        init: str = "kaiming",
    ):
        super().__init__(base_layer)
        if init not in ("kaiming", "gaussian"):
            raise ValueError(f"adapter.init={init} is not defined for embeddings: use kaiming or exclude the embedding")
        device = base_layer.weight.device
        self.rank = rank
        self.scaling = alpha / rank**0.5 if rank_stabilized else alpha / rank
        self.lora_embedding_A = nn.Parameter(
            torch.empty(rank, base_layer.num_embeddings, device=device, dtype=torch.float32)
        )
        self.lora_embedding_B = nn.Parameter(
            torch.empty(base_layer.embedding_dim, rank, device=device, dtype=torch.float32)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.lora_embedding_A)
        nn.init.normal_(self.lora_embedding_B)

    def adapt(self, x: Tensor, base_output: Tensor) -> Tensor:
        inner = F.embedding(x, self.lora_embedding_A.t()).to(base_output.dtype)
        return base_output + self.scaling * (inner @ self.lora_embedding_B.t().to(base_output.dtype))

    def delta_weight(self) -> Tensor:
        return self.scaling * (self.lora_embedding_B.float() @ self.lora_embedding_A.float()).t()
