"""A low-rank change and the frozen layer under it in one autograd function: the fused forms of LoRA, DoRA and VeRA.

Each function computes what the formula in its docstring says; `adapt` of the method's layer is that formula in plain
torch, and a test holds the two together. The base is a layer to run, or the output of one that was run before.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_peft.kernels.frozen_linear import (
    GIVEN,
    Base,
    base_gradients,
    base_input_gradient,
    base_with_product,
    factor_gradients,
    input_gradient,
    mark_written,
)
from lightning_peft.kernels.products import scale_


def add_low_rank(base: Base, x: Tensor, A: Tensor, B: Tensor, scaling: float, dropout: float = 0.0) -> Tensor | None:
    """Return base + scaling * dropout(x) A^T B^T, (..., out_features).

    The result is None where dropout cannot be drawn again and the base was not run yet.
    """
    if dropout and not can_redraw(x):
        if base.form != GIVEN:
            return None
        x, dropout = F.dropout(x, dropout), 0.0
    return LowRankProduct.apply(base.first, x, A, B, scaling, dropout, *base.rest())


def add_and_scale(
    base: Base, x: Tensor, A: Tensor, B: Tensor, gain: Tensor, scaling: float, given_bias: Tensor | None
) -> Tensor:
    """Return bias + gain * (base - bias + scaling * x A^T B^T), (..., out_features).

    A base that was run before has its bias in it: `given_bias` is that bias.
    """
    return MagnitudeProduct.apply(base.first, x, A, B, gain, given_bias, scaling, *base.rest())


def scaled_sum(total: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """Return gain * total + bias, (..., out_features), in the dtype of total; gain (out_features,) is at least fp32."""
    return ScaledSum.apply(total, gain, bias)


def add_vectors(base: Base, x: Tensor, A: Tensor, B: Tensor, d: Tensor, b: Tensor) -> Tensor:
    """Return base + b * (B (d * (A x))), (..., out_features)."""
    return VectorProduct.apply(base.first, x, A, B, d, b, *base.rest())


def can_redraw(x: Tensor) -> bool:
    """Return whether a function may drop inputs of x and draw the same again in its backward pass.

    The compiler follows no generators, and decides by itself what it keeps.
    """
    return x.device.type in ("cpu", "cuda") and not torch.compiler.is_compiling()


def random_state(device: torch.device) -> torch.Generator:
    """Return the generator that dropout on this device draws from."""
    return torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator


def dropout_mask(shape: torch.Size, dropout: float, like: Tensor, state: Tensor) -> Tensor:
    """Return what `F.dropout` multiplied by when the generator was in this state; leave the generator as it is."""
    generator = random_state(like.device)
    now = generator.get_state()
    generator.set_state(state)
    mask = F.dropout(like.new_ones(shape), dropout)
    generator.set_state(now)
    return mask


class LowRankProduct(torch.autograd.Function):
    """base + scaling * dropout(x) A^T B^T, where `base` is the frozen layer's output for x.

    Saves the (N, R) product and, when A trains, x once in the dtype it came in: the same tensor for all layers that it
    is fed to. Dropout is drawn again in the backward pass. The gradients of A and B come out in their own dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, first: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float, dropout: float, *rest: Any
    ) -> Tensor:
        base = Base.of(first, rest)
        dtype = base.dtype
        ctx.dropout_state = random_state(x.device).get_state() if dropout else None
        cast = x.to(dtype)
        # The gradient is contiguous, as the mask that is drawn again is.
        dropped = F.dropout(x.contiguous(), dropout).to(dtype) if dropout else cast
        inner = dropped.reshape(-1, x.shape[-1]) @ (scaling * A).to(dtype).t()
        output = base_with_product(cast, base, inner, B.to(dtype))
        mark_written(ctx, base, output)
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, inner, A, B, *base.kept())
        ctx.base = base._replace(tensors=())
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.scaling, ctx.dropout = scaling, dropout
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, inner, A, B, *frozen = ctx.saved_tensors
        base = ctx.base._replace(tensors=tuple(frozen))
        dtype = grad.dtype
        grad_rows = grad.reshape(-1, grad.shape[-1])
        needs_x, needs_A, needs_B = ctx.needs_input_grad[1:4]
        grad_x = mask = None
        if ctx.dropout and (needs_x or needs_A):
            mask = dropout_mask(ctx.x_shape, ctx.dropout, grad.new_empty(0, dtype=ctx.x_dtype), ctx.dropout_state)
            mask = mask.view(-1, A.shape[1])
        dropped = None
        if needs_A:
            rows = x.reshape(-1, A.shape[1])
            dropped = (rows if mask is None else rows * mask).to(dtype)
            del rows
        # The small products come first, while what they read is in the caches.
        grad_inner, grad_A, grad_B = factor_gradients(grad_rows, dropped, inner, B.to(dtype), needs_B)
        del x, dropped  # they are large, and the base's gradient is about to be made
        if grad_A is not None:
            grad_A = grad_A.to(A.dtype).mul_(ctx.scaling)
        if grad_B is not None:
            grad_B = grad_B.to(B.dtype)
        scaled_A = (ctx.scaling * A).to(dtype)
        if needs_x:
            if mask is None:
                grad_x = input_gradient(grad_rows, base, grad_inner, scaled_A)
            else:
                grad_x = mask.mul_(grad_inner @ scaled_A)
                if base.form != GIVEN:
                    grad_x = base_input_gradient(grad_rows, base).add_(grad_x)
            grad_x = grad_x.view(ctx.x_shape).to(ctx.x_dtype)
        grad_first, grad_rest = base_gradients(grad, base, ctx.needs_input_grad)
        return grad_first, grad_x, grad_A, grad_B, None, None, *grad_rest


class MagnitudeProduct(torch.autograd.Function):
    """bias + gain * (base - bias + scaling * x A^T B^T), where `base` is the frozen layer's output for x.

    Keeps the output for the gradient of `gain`, not the value before the gain: the next operation mostly keeps the
    same tensor. A feature whose gain is exactly zero gets no gradient for it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        first: Tensor,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        gain: Tensor,
        given_bias: Tensor | None,
        scaling: float,
        *rest: Any,
    ) -> Tensor:
        base = Base.of(first, rest)
        dtype = base.dtype
        cast = x.to(dtype)
        inner = cast.reshape(-1, x.shape[-1]) @ (scaling * A).to(dtype).t()
        output = base_with_product(cast, base, inner, B.to(dtype), gain, given_bias)
        mark_written(ctx, base, output)
        ctx.save_for_backward(x, inner, A, B, gain, given_bias, output, *base.kept())
        ctx.base, ctx.scaling = base._replace(tensors=()), scaling
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, inner, A, B, gain, given_bias, output, *frozen = ctx.saved_tensors
        base = ctx.base._replace(tensors=tuple(frozen))
        bias = given_bias if base.form == GIVEN else base.tensors[-1]
        dtype = grad.dtype
        grad_rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_gain = grad_bias = None
        scaled_B = (ctx.scaling * gain)[:, None] * B
        x_rows = x.reshape(-1, x.shape[-1]).to(dtype) if ctx.needs_input_grad[2] else None
        grad_inner, grad_A, grad_B = factor_gradients(
            grad_rows, x_rows, inner, scaled_B.to(dtype), ctx.needs_input_grad[3]
        )
        if grad_A is not None:
            grad_A = grad_A.to(A.dtype)
        if grad_B is not None:
            grad_B = grad_B.to(B.dtype).mul_(gain[:, None])
        if ctx.needs_input_grad[4]:
            grad_gain = gain_gradient(grad_rows, output.view(-1, output.shape[-1]), gain, bias)
        if ctx.needs_input_grad[5]:
            # The rest of a trained bias' gradient comes through the given output.
            grad_bias = ((1 - gain) * grad_rows.sum(0, dtype=gain.dtype)).to(given_bias.dtype)
        x_shape, x_dtype = x.shape, x.dtype
        del x, x_rows, output  # they are large, and the base's gradient is about to be made
        to_base = grad  # the bias of a base that is run in here is not under the gain
        if base.form == GIVEN or ctx.needs_input_grad[1]:
            grad_base = grad_rows * gain.to(dtype)
            if ctx.needs_input_grad[1]:
                grad_x = input_gradient(grad_base, base, grad_inner, A.to(dtype)).view(x_shape).to(x_dtype)
            if base.form == GIVEN:
                to_base = grad_base.view(grad.shape)
        grad_first, grad_rest = base_gradients(to_base, base, ctx.needs_input_grad)
        return grad_first, grad_x, grad_A, grad_B, grad_gain, grad_bias, None, *grad_rest


class ScaledSum(torch.autograd.Function):
    """gain * total + bias: what `MagnitudeProduct` does after its sum, by itself.

    A compiler fuses it with what reads it and keeps what it likes, without rounding gain or its gradient's terms to
    16 bits. Elsewhere total is written over, and kept, as there.
    """

    @staticmethod
    def forward(ctx: Any, total: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(total, gain, bias)
        if torch.compiler.is_compiling():
            scaled = total * gain
            return (scaled if bias is None else scaled + bias).to(total.dtype)
        ctx.mark_dirty(total)
        scale_(total, gain, None)
        return total if bias is None else total.add_(bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        kept, gain, bias = ctx.saved_tensors
        rows, kept_rows = (tensor.reshape(-1, grad.shape[-1]) for tensor in (grad, kept))
        if torch.compiler.is_compiling():
            grad_total = (grad * gain).to(grad.dtype)
            grad_gain = (rows.to(gain.dtype) * kept_rows).sum(0)
        else:
            grad_total = grad * gain.to(grad.dtype)
            grad_gain = gain_gradient(rows, kept_rows, gain, bias)
        grad_bias = None
        if bias is not None and ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0, dtype=gain.dtype).to(bias.dtype)
        return grad_total, grad_gain, grad_bias


def gain_gradient(grad: Tensor, output: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """Return the gradient of gain (out_features,) in output = gain * total + bias; 0 where gain is.

    grad and output are (N, out_features).
    """
    sums: Tensor = torch.ops.lightning_peft.column_dots(grad, output)
    if bias is not None:
        sums = sums - bias.to(sums.dtype) * grad.sum(0, dtype=sums.dtype)
    return torch.where(gain == 0, 0, sums / gain).to(gain.dtype)


class VectorProduct(torch.autograd.Function):
    """base + b * (B (d * (A x))), where `base` is the frozen layer's output for x. Keeps (N, rank) of activations."""

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
