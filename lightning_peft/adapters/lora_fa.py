"""LoRA-FA: LoRA with A frozen, so that no input of an adapted layer is kept (Zhang et al. 2023, arXiv:2308.03303)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapters.base import Target
from lightning_peft.adapters.lora import PEFT, LoRAConfig, LoRALinear
from lightning_peft.adapters.method import Contract, Method, linears


@dataclass
class LoRAFAConfig(LoRAConfig):
    method: str = "lora_fa"
    gradient_correction: bool = False
    """Give B the gradient whose step is nearest to full fine-tuning's, grad (A A^T)^-1 / scaling^2, as HF PEFT's
    LoRA-FA optimiser does; the first version of the paper takes the plain gradient."""


class CorrectedGradient(torch.autograd.Function):
    """B, whose gradient g comes out as g (A A^T)^-1 / scaling^2: then scaling * g A is the part of the full gradient
    that lies in the rows of A."""

    @staticmethod
    def forward(ctx: Any, B: Tensor, A: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(A)
        ctx.scaling = scaling
        return B.view_as(B)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        (A,) = ctx.saved_tensors
        return torch.linalg.solve(A @ A.t(), grad, left=False) / ctx.scaling**2, None, None


class LoRAFALinear(LoRALinear):
    """y = W x + scaling * B A x with A at its random start: B alone trains, and (N, rank) of activations is kept.

    A is part of the adapter all the same and is stored with it.
    """

    def __init__(self, base_layer: nn.Module, target: Target, config: LoRAFAConfig):
        super().__init__(base_layer, target, config)
        self.gradient_correction = config.gradient_correction
        if self.gradient_correction and self.rank > target.in_features:
            raise ValueError(
                f"adapter.gradient_correction=true adapter.rank={self.rank}: A A^T has no inverse above the "
                f"{target.in_features} inputs of {target.name}"
            )
        self.lora_A.weight.requires_grad_(False)

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = super().factors()
        return A, CorrectedGradient.apply(B, A, self.scaling) if self.gradient_correction else B


METHOD = Method(
    LoRAFAConfig,
    linears(LoRAFALinear),
    trained=("lora_B.weight",),
    change="s B A with A frozen",
    paper="arXiv:2308.03303",
    count="r d",
    peft=PEFT,
    contract=Contract(trained=lambda t: t.rank * t.out_features, frozen=lambda t: t.rank * t.in_features),
)
