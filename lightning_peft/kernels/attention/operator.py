"""Causal attention over packed samples on a CPU, as operators.

They are operators so that the compiler keeps a block in one graph. Tensors kept for the backward pass have the dtype
they came in. Two implementations compute the operators: for bf16 on a processor with AVX-512 a kernel in C++
(`native`), two to three times as fast as the other, products of torch (`strips`), which run anywhere.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_peft.kernels.attention import native, strips
from lightning_peft.kernels.attention.grouping import find_samples


def implementation(query: Tensor) -> Any:
    """Return the module whose `attend`, `attend_backward` and `scratch` compute attention of these heads."""
    return native if native.takes(query) else strips


@torch.library.custom_op("lightning_peft::sample_attention", mutates_args=(), device_types="cpu")
def sample_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scaling: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """Compute causal attention inside each sample: output (B, T, H, D) and log normalisers (B, T, H) fp32.

    query (B, H, T, D); key and value (B, G, T, D); cu_seqlens as `varlen_attention` has it.
    """
    samples = find_samples(cu_seqlens, query.shape[0], query.shape[2])
    output, normalizers = implementation(query).attend(query, key, value, samples, scaling, window)
    return output, normalizers


@sample_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scaling: float, window: int | None
) -> tuple[Tensor, Tensor]:
    rows, heads, width, head_dim = query.shape
    return query.new_empty(rows, width, heads, head_dim), query.new_empty(rows, width, heads, dtype=torch.float32)


@torch.library.custom_op("lightning_peft::sample_attention_backward", mutates_args=(), device_types="cpu")
def sample_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    normalizers: Tensor,
    cu_seqlens: Tensor,
    scaling: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `sample_attention` with respect to query, key and value."""
    samples = find_samples(cu_seqlens, query.shape[0], query.shape[2])
    grad_query, grad_key, grad_value = implementation(query).attend_backward(
        grad_output, query, key, value, output, normalizers, samples, scaling, window
    )
    return grad_query, grad_key, grad_value


@sample_attention_backward.register_fake
def _(grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad_query, grad_key, grad_value = (
        x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (query, key, value)
    )
    return grad_query, grad_key, grad_value


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, cu_seqlens, ctx.scaling, ctx.window = inputs
    ctx.save_for_backward(query, key, value, *output, cu_seqlens)


def _backward(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = sample_attention_backward(grad_output, *ctx.saved_tensors, ctx.scaling, ctx.window)
    return *gradients, None, None, None


sample_attention.register_autograd(_backward, setup_context=_save_for_backward)
