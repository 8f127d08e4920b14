"""The product with a weight times a low-rank change, element by element: the fused form of HiRA."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def hadamard_product(x: Tensor, A: Tensor, B: Tensor, read_weight: Callable[[], Tensor]) -> Tensor:
    """Return x (W * B A)^T, (..., out_features), in the dtype of x; `read_weight` gives W (out_features, in_features).

    A is (rank, in_features), B (out_features, rank). The dense product is formed again in the backward pass, not kept.
    """
    return HadamardProduct.apply(x, A, B, read_weight)


class HadamardProduct(torch.autograd.Function):
    """x (W * B A)^T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, read_weight: Callable[[], Tensor]) -> Tensor:
        ctx.save_for_backward(x, A, B)
        ctx.read_weight = read_weight
        return F.linear(x, _change(read_weight(), A, B, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, A, B = ctx.saved_tensors
        weight = ctx.read_weight()
        grad_x = grad @ _change(weight, A, B, grad.dtype) if ctx.needs_input_grad[0] else None
        grad_change = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
        grad_product = grad_change.to(A.dtype).mul_(weight)
        return grad_x, B.t() @ grad_product, grad_product @ A.t(), None


def _change(weight: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
    """Return W * B A, (out_features, in_features)."""
    return (B @ A).mul_(weight).to(dtype)
