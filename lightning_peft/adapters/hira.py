"""HiRA: a low-rank product that multiplies the weight element by element (Huang et al. 2025, ICLR)."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter, AdapterConfig, Target
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

    def layer_options(self, target: Target) -> dict[str, Any]:
        return {"rank": target.rank, "dropout": self.dropout}


class HadamardProduct(torch.autograd.Function):
    """x (W * B A)^T, where W is a layer's weight. The dense product is formed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, layer: nn.Module) -> Tensor:
        ctx.save_for_backward(x, A, B)
        ctx.layer = layer
        return F.linear(x, change(layer, A, B, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, A, B = ctx.saved_tensors
        grad_x = grad @ change(ctx.layer, A, B, grad.dtype) if ctx.needs_input_grad[0] else None
        grad_change = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
        grad_product = grad_change.to(A.dtype).mul_(dense_weight(ctx.layer))
        return grad_x, B.t() @ grad_product, grad_product @ A.t(), None


def change(layer: nn.Module, A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
    """W * B A, (out, in)."""
    return (B @ A).mul_(dense_weight(layer)).to(dtype)


class HiRALinear(Adapter):
    """y = W x + (W * B A) x: the change has the rank of W, not of B A. There is no scaling.

    `hira_A` (rank, in_features) is Kaiming-uniform, `hira_B` (out_features, rank) zero, both fp32.
    """

    def __init__(self, base_layer: nn.Module, rank: int, dropout: float = 0.0):
        super().__init__(base_layer)
        out_features, in_features = linear_shape(base_layer)
        device = next(base_layer.parameters()).device
        self.rank = rank
        self.dropout = dropout
        self.hira_A = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=torch.float32))
        self.hira_B = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.hira_A, a=math.sqrt(5))
        nn.init.zeros_(self.hira_B)

    def adapt(self, x: Tensor, base_output: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return base_output + HadamardProduct.apply(x.to(base_output.dtype), self.hira_A, self.hira_B, self.base_layer)

    def delta_weight(self) -> Tensor:
        return change(self.base_layer, self.hira_A, self.hira_B, torch.float32)
