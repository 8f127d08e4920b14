"""VeRA: trained vectors around one random pair that all layers share (Kopiczko et al. 2024, arXiv:2310.11454)."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.adapters.base import AdapterConfig, Target
from lightning_peft.adapters.frozen_linear import (
    Base,
    FusedAdapter,
    base_gradients,
    base_with_product,
    input_gradient,
    mark_written,
)
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

    def layer_options(self, target: Target) -> dict[str, Any]:
        return {"dropout": self.dropout, "initial_d": self.initial_d}


class SharedProjection(nn.Module):
    """The frozen random pair of all layers, at the largest sizes among them; a layer uses the leading rows and columns.

    vera_A (rank, max in_features) and vera_B (max out_features, rank), fp32, Kaiming-uniform with gain sqrt(2): drawn
    on the CPU from a seed of their own, A first, so that every rank and HF PEFT have the same numbers.
    """

    vera_A: Tensor
    vera_B: Tensor

    def __init__(self, config: VeRAConfig, targets: list[Target]):
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


class VectorProduct(torch.autograd.Function):
    """base + b * (B (d * (A x))), where `base` is what the frozen layer makes of x. Keeps (N, rank) of activations."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, x: Tensor, A: Tensor, B: Tensor, d: Tensor, b: Tensor, *rest: Any) -> Tensor:
        base = Base.of(first, rest)
        dtype = base.dtype
        cast = x.to(dtype)
        inner = cast.reshape(-1, x.shape[-1]) @ A.to(dtype).t()
        output = base_with_product(cast, base, inner, (b[:, None] * B * d).to(dtype))
        mark_written(ctx, base, output)
        ctx.save_for_backward(inner, A, B, d, b, *base.kept())
        ctx.base, ctx.x_shape, ctx.x_dtype = base._replace(tensors=()), x.shape, x.dtype
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        inner, A, B, d, b, *frozen = ctx.saved_tensors
        base = ctx.base._replace(tensors=tuple(frozen))
        dtype = grad.dtype
        grad_rows = grad.reshape(-1, grad.shape[-1])
        grad_scaled = grad_rows @ (b[:, None] * B).to(dtype)
        grad_x = grad_d = grad_b = None
        if ctx.needs_input_grad[1]:
            grad_x = input_gradient(grad_rows, base, grad_scaled * d.to(dtype), A.to(dtype))
            grad_x = grad_x.view(ctx.x_shape).to(ctx.x_dtype)
        if ctx.needs_input_grad[4]:
            grad_d = (grad_scaled * inner).sum(0, dtype=d.dtype)
        if ctx.needs_input_grad[5]:
            grad_b = ((grad_rows.t() @ inner).to(b.dtype) * (B * d)).sum(1)
        grad_first, grad_rest = base_gradients(grad, base, ctx.needs_input_grad)
        return grad_first, grad_x, None, None, grad_d, grad_b, *grad_rest


class VeRALinear(FusedAdapter):
    """y = W x + b * (B (d * (A x)))   (eq. 2).

    Trained: `vera_lambda_d` (rank,), constant at the start, and `vera_lambda_b` (out_features,), zero. There is no
    scaling.
    """

    def __init__(self, base_layer: nn.Module, shared: SharedProjection, dropout: float = 0.0, initial_d: float = 0.1):
        super().__init__(base_layer)
        self.out_features, self.in_features = linear_shape(base_layer)
        device = next(base_layer.parameters()).device
        self.dropout = dropout
        self.initial_d = initial_d
        # In a tuple, so that the pair is no submodule of each layer: the model registers it once.
        self._shared = (shared,)
        rank = shared.vera_A.shape[0]
        self.vera_lambda_b = nn.Parameter(torch.empty(self.out_features, device=device, dtype=torch.float32))
        self.vera_lambda_d = nn.Parameter(torch.empty(rank, device=device, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.vera_lambda_b)
        nn.init.constant_(self.vera_lambda_d, self.initial_d)

    def projection(self) -> tuple[Tensor, Tensor]:
        """This layer's part of the pair: A (rank, in_features), B (out_features, rank)."""
        (shared,) = self._shared
        return shared.vera_A[:, : self.in_features], shared.vera_B[: self.out_features]

    def fuses(self, x: Tensor) -> bool:
        return not self.active_dropout

    def add_to(self, base: Base, x: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        d, b = self.vera_lambda_d, self.vera_lambda_b
        return VectorProduct.apply(base.first, x, *self.projection(), d, b, *base.rest())

    def delta_weight(self) -> Tensor:
        A, B = self.projection()
        return (self.vera_lambda_b[:, None] * B.float()) @ (self.vera_lambda_d[:, None] * A.float())
