"""VeRA: trained vectors around one random pair that all layers share (Kopiczko et al. 2024, arXiv:2310.11454)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter, AdapterConfig, LowRank, Target
from lightning_peft.adapters.method import Contract, Method, PeftSpelling, linears
from lightning_peft.kernels.frozen_linear import GIVEN, Base
from lightning_peft.kernels.low_rank import add_vectors
from lightning_peft.quantization.weights import linear_shape


@dataclass
class VeRAConfig(AdapterConfig):
    method: str = "vera"
    rank: int | None = 256
    dropout: float = 0.0
    """Probability of dropping an input of A."""
    initial_d: float = 0.1
    """Start of every element of d; the paper takes at most 0.1."""
    projection_seed: int = 0
    """Seed of the shared pair."""
    save_projection: bool = True
    """Store the pair with the adapter; without, a load depends on PyTorch drawing the same numbers for the seed."""

    uses_alpha: ClassVar[bool] = False
    rank_costs_parameters: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise ValueError(f"adapter.dropout={self.dropout}: must be in [0, 1)")
        if self.rank_pattern or self.rank_last is not None:
            raise ValueError("adapter.rank_pattern and rank_last: the layers of VeRA share one pair, so one rank")


class SharedProjection(nn.Module):
    """The frozen random pair of all layers, at the largest sizes among them; a layer uses the leading rows and columns.

    vera_A (rank, max in_features) and vera_B (max out_features, rank), fp32, Kaiming-uniform with gain sqrt(2): drawn
    on the CPU from a seed of their own, A first, so that every rank and HF PEFT have the same numbers.
    """

    vera_A: Tensor
    vera_B: Tensor

    def __init__(self, config: VeRAConfig, targets: list[Target], model: nn.Module):
        super().__init__()
        assert config.rank is not None
        self.seed = config.projection_seed
        self.register_buffer(
            "vera_A", torch.empty(config.rank, max(t.in_features for t in targets)), config.save_projection
        )
        self.register_buffer(
            "vera_B", torch.empty(max(t.out_features for t in targets), config.rank), config.save_projection
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        for matrix in (self.vera_A, self.vera_B):
            if not matrix.is_meta:
                bound = math.sqrt(6 / matrix.shape[1])
                matrix.copy_(torch.empty(matrix.shape, device="cpu").uniform_(-bound, bound, generator=generator))


class VeRALinear(Adapter):
    """y = W x + b * (B (d * (A x)))   (eq. 2).

    Trained: `vera_lambda_d` (rank,), constant at the start, and `vera_lambda_b` (out_features,), zero. There is no
    scaling.
    """

    def __init__(self, base_layer: nn.Module, target: Target, config: VeRAConfig, shared: SharedProjection):
        super().__init__(base_layer)
        self.out_features, self.in_features = linear_shape(base_layer)
        device = next(base_layer.parameters()).device
        self.dropout = config.dropout
        self.initial_d = config.initial_d
        # The tuple keeps the pair from being a submodule of each layer: the model registers it once.
        self._shared = (shared,)
        rank = shared.vera_A.shape[0]
        self.vera_lambda_b = nn.Parameter(torch.empty(self.out_features, device=device, dtype=torch.float32))
        self.vera_lambda_d = nn.Parameter(torch.empty(rank, device=device, dtype=torch.float32))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.vera_lambda_b)
        nn.init.constant_(self.vera_lambda_d, self.initial_d)

    def projection(self) -> tuple[Tensor, Tensor]:
        """Return this layer's part of the pair: A (rank, in_features), B (out_features, rank)."""
        (shared,) = self._shared
        return shared.vera_A[:, : self.in_features], shared.vera_B[: self.out_features]

    def adapt(self, x: Tensor, base_output: Tensor) -> Tensor:
        dropped = F.dropout(x, self.dropout, self.training).to(base_output.dtype)
        d, b, A, B = (part.to(dropped.dtype) for part in (self.vera_lambda_d, self.vera_lambda_b, *self.projection()))
        return base_output + b * (d * (dropped @ A.t()) @ B.t())

    def fused(self, x: Tensor, base: Base) -> Tensor | None:
        if self.active_dropout:
            if base.form != GIVEN:  # a base run in the same step would be fed the dropped input
                return None
            x = F.dropout(x, self.dropout)
        return add_vectors(base, x, *self.projection(), self.vera_lambda_d, self.vera_lambda_b)

    def delta_weight(self) -> Tensor:
        A, B = self.projection()
        return (self.vera_lambda_b[:, None] * B.float()) @ (self.vera_lambda_d[:, None] * A.float())

    def low_rank(self) -> LowRank:
        A, B = self.projection()
        d, b = self.vera_lambda_d.detach(), self.vera_lambda_b.detach()
        return LowRank(A.float(), b[:, None] * B.float() * d, 1.0)


METHOD = Method(
    VeRAConfig,
    linears(VeRALinear),
    trained=("vera_lambda_d", "vera_lambda_b"),
    change="diag(b) B diag(d) A, one frozen pair A, B for all layers",
    paper="arXiv:2310.11454",
    count="d + r",
    shared=SharedProjection,
    peft=PeftSpelling(
        "VERA",
        ("vera_lambda_d", "vera_lambda_b"),
        {
            "dropout": "vera_dropout",
            "initial_d": "d_initial",
            "projection_seed": "projection_prng_key",
            "save_projection": "save_projection",
        },
        constants={"bias": "none", "init_weights": True},
    ),
    contract=Contract(trained=lambda t: t.out_features + t.rank),
)
