"""The product of a frozen linear layer, inside the autograd function of the low-rank change beside it.

In one function a matrix product adds up the input's two gradients, which else takes a pass over a tensor made for it,
and autograd runs one node a layer. A `Base` tells the function what it has to know of the layer.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

import lightning_peft.kernels.codes  # noqa: F401  registers coded_matmul
from lightning_peft.kernels import products

GIVEN, DENSE = "given", "dense"


class Base(NamedTuple):
    """The frozen layer under a change, in plain values, as the compiler wants a function's arguments."""

    dtype: torch.dtype
    """dtype in which the products are computed."""
    form: str
    """given: the output; dense: weight and bias; nf4, fp4, int8: four tensors of codes and bias."""
    block_size: int
    tensors: tuple[Tensor | None, ...]

    @property
    def first(self) -> Tensor:
        """Return the output or the weight, the function's first argument: autograd looks there for overwrites."""
        tensor = self.tensors[0]
        assert tensor is not None
        return tensor

    def rest(self) -> tuple[Any, ...]:
        """Return the function's last arguments; its `forward` puts the two together with `Base.of`."""
        return self.dtype, self.form, self.block_size, *self.tensors[1:]

    @classmethod
    def of(cls, first: Tensor, rest: tuple[Any, ...]) -> "Base":
        dtype, form, block_size, *tensors = rest
        return cls(dtype, form, block_size, (first, *tensors))

    def kept(self) -> tuple[Tensor | None, ...]:
        """Return the tensors that the backward pass needs."""
        return () if self.form == GIVEN else self.tensors


def given(output: Tensor) -> Base:
    """Make the base of a layer that was run before from its output (..., out_features), which will be written over."""
    return Base(output.dtype, GIVEN, 0, (output,))


def base_with_product(
    x: Tensor, base: Base, inner: Tensor, factor: Tensor, gain: Tensor | None = None, given_bias: Tensor | None = None
) -> Tensor:
    """Return gain (x W^T + inner factor^T) + bias, (..., out_features), in a tensor that may be written over.

    x, inner (N, R) and factor (out_features, R) have the products' dtype, gain (out_features,) at least fp32. A given
    base, which `given_bias` is in, is written over wherever that is possible: the compiler cannot follow the
    `mark_dirty` it needs.
    """
    if base.form != GIVEN:
        bias = base.tensors[-1]
        bias = None if bias is None else bias.to(base.dtype)
        return _low_rank_sum(x, base, inner, factor, gain, bias, True)
    rows = base.first.view(-1, base.first.shape[-1])
    bias = None if given_bias is None else given_bias.to(base.dtype)
    if torch.compiler.is_compiling():
        rows = rows.addmm(inner, factor.t())
        if gain is not None:
            rows = rows.addcmul(rows if bias is None else rows - bias, (gain - 1).to(base.dtype))
        return rows.view(base.first.shape)
    products.scale_(rows.addmm_(inner, factor.t()), gain, bias)
    return base.first


def _low_rank_sum(
    x: Tensor,
    base: Base,
    inner: Tensor,
    factor: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    transposed: bool,
) -> Tensor:
    """Call `low_rank_sum` over the weight of a base that was not run yet."""
    if base.form == DENSE:
        return torch.ops.lightning_peft.low_rank_sum(x, dense_weight(base), inner, factor, gain, bias, transposed)
    *codes, _ = base.tensors
    options = base.form, base.block_size, transposed
    return torch.ops.lightning_peft.coded_matmul(x, *codes, bias, inner, factor, gain, *options)


def base_input_gradient(grad: Tensor, base: Base) -> Tensor:
    """Return grad W, (N, in_features), a new tensor, from grad (N, out_features)."""
    if base.form == DENSE:
        return grad @ dense_weight(base)
    *weight, _ = base.tensors
    options = base.form, base.block_size, False
    return torch.ops.lightning_peft.coded_matmul(grad, *weight, None, None, None, None, *options)


def base_gradients(
    grad: Tensor, base: Base, needed: tuple[bool, ...]
) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
    """Return the gradients of a function's first argument and of its last ones from that of the base's output.

    A given base passes the gradient of its output on; of any other only a trained bias has one.
    """
    if base.form == GIVEN:
        return grad, (None, None, None)
    bias = base.tensors[-1]
    grad_bias = None
    if bias is not None and needed[-1]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(bias.dtype)
    return None, (None, None, None, *(None for _ in base.tensors[2:]), grad_bias)


def dense_weight(base: Base) -> Tensor:
    """Return W, (out_features, in_features), in the products' dtype: decoded where it is stored as codes."""
    if base.form == DENSE:
        return base.first.to(base.dtype)
    *codes, _ = base.tensors
    return torch.ops.lightning_peft.dequantize(*codes, base.form, base.block_size, base.dtype)


def mark_written(ctx: Any, base: Base, output: Tensor) -> None:
    """Tell autograd when the function's output is its input, written over."""
    if base.form == GIVEN and not torch.compiler.is_compiling():
        ctx.mark_dirty(output)


def input_gradient(grad: Tensor, base: Base, grad_inner: Tensor, A: Tensor) -> Tensor:
    """Return grad W + grad_inner A, (N, in_features), a new tensor; under a given base the second term alone."""
    if base.form == GIVEN:
        return grad_inner @ A
    return _low_rank_sum(grad, base, grad_inner, A, None, None, False)


def factor_gradients(
    grad: Tensor, x: Tensor | None, inner: Tensor, B: Tensor, needs_B: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of inner (N, R), A (R, in_features) and B (out_features, R) in x A^T B^T; inner is x A^T.

    grad (N, out_features) and x (N, in_features) have the products' dtype; without x, A has no gradient.
    """
    if x is not None and needs_B:
        return torch.ops.lightning_peft.low_rank_gradients(grad, x, inner, B)
    grad_inner = grad @ B
    # There are two ways to write the last product; this one leaves the wide matrix as it lies.
    grad_B = products.summed_product(inner.t(), grad).t().contiguous() if needs_B else None
    return grad_inner, None if x is None else products.summed_product(grad_inner.t(), x), grad_B
