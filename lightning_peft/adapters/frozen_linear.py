"""The product of a frozen linear layer, inside the autograd function of the low-rank change beside it.

In one function the input's two gradients are added up by a matrix product, not by a pass of their own over a tensor
made for it, and autograd runs one node a layer. What such a function is told of the layer is a `Base`.
"""

from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter
from lightning_peft.native import linear
from lightning_peft.quantization.nf4 import NF4Linear

GIVEN, DENSE = "given", "dense"


class Base(NamedTuple):
    """What a change is added to; plain values, as the compiler wants the arguments of an autograd function."""

    dtype: torch.dtype
    """Of the products."""
    form: str
    """given: the output; dense: weight and bias; nf4, fp4, int8: four tensors of codes and bias."""
    block_size: int
    tensors: tuple[Tensor | None, ...]

    @property
    def first(self) -> Tensor:
        """The output or the weight: the first argument of a function, where autograd looks for what is written over."""
        tensor = self.tensors[0]
        assert tensor is not None
        return tensor

    def rest(self) -> tuple[Any, ...]:
        """The function's last arguments; its `forward` puts the two together with `Base.of`."""
        return self.dtype, self.form, self.block_size, *self.tensors[1:]

    @classmethod
    def of(cls, first: Tensor, rest: tuple[Any, ...]) -> "Base":
        dtype, form, block_size, *tensors = rest
        return cls(dtype, form, block_size, (first, *tensors))

    def kept(self) -> tuple[Tensor | None, ...]:
        """What the backward pass needs of the tensors."""
        return () if self.form == GIVEN else self.tensors


def given(output: Tensor) -> Base:
    """A base that was run before: its output (..., out_features), which will be written over."""
    return Base(output.dtype, GIVEN, 0, (output,))


def frozen_base(layer: nn.Module, x: Tensor) -> Base | None:
    """The base to run on x (..., in_features); None where only the layer's own forward says what it does."""
    if layer._forward_pre_hooks or layer._forward_hooks or layer._backward_pre_hooks or layer._backward_hooks:
        return None
    if "forward" in layer.__dict__:  # as libraries that move weights to and fro put one there
        return None
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    if type(layer) is NF4Linear:
        return Base(dtype, layer.kind, layer.block_size, (*layer.codes, layer.bias))
    if type(layer) is not nn.Linear or layer.weight.requires_grad or (layer.weight.dtype != dtype and not autocast):
        return None
    return Base(dtype, DENSE, 0, (layer.weight, layer.bias))


def base_with_product(
    x: Tensor, base: Base, inner: Tensor, factor: Tensor, gain: Tensor | None = None, given_bias: Tensor | None = None
) -> Tensor:
    """gain (x W^T + inner factor^T) + bias, (..., out_features), in a tensor that may be written over.

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
    linear.scale_(rows.addmm_(inner, factor.t()), gain, bias)
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
    """`low_rank_sum` over the weight of a base that was not run yet."""
    if base.form == DENSE:
        return torch.ops.lightning_peft.low_rank_sum(x, _dense(base), inner, factor, gain, bias, transposed)
    *codes, _ = base.tensors
    options = base.form, base.block_size, transposed
    return torch.ops.lightning_peft.matmul_4bit(x, *codes, bias, inner, factor, gain, *options)


def base_input_gradient(grad: Tensor, base: Base) -> Tensor:
    """grad W, (N, in_features), a new tensor, from grad (N, out_features)."""
    if base.form == DENSE:
        return grad @ _dense(base)
    *weight, _ = base.tensors
    options = base.form, base.block_size, False
    return torch.ops.lightning_peft.matmul_4bit(grad, *weight, None, None, None, None, *options)


def base_gradients(
    grad: Tensor, base: Base, needed: tuple[bool, ...]
) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
    """Those of the first argument and of the last ones, from the gradient of the base's output.

    The output's itself, or a trained bias'.
    """
    if base.form == GIVEN:
        return grad, (None, None, None)
    bias = base.tensors[-1]
    grad_bias = None
    if bias is not None and needed[-1]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(bias.dtype)
    return None, (None, None, None, *(None for _ in base.tensors[2:]), grad_bias)


def _dense(base: Base) -> Tensor:
    """W, (out_features, in_features)."""
    return base.first.to(base.dtype)


def mark_written(ctx: Any, base: Base, output: Tensor) -> None:
    """Tell autograd when the function's output is its input, written over."""
    if base.form == GIVEN and not torch.compiler.is_compiling():
        ctx.mark_dirty(output)


def input_gradient(grad: Tensor, base: Base, grad_inner: Tensor, A: Tensor) -> Tensor:
    """grad W + grad_inner A, (N, in_features), a new tensor; of a given base the second alone."""
    if base.form == GIVEN:
        return grad_inner @ A
    return _low_rank_sum(grad, base, grad_inner, A, None, None, False)


def factor_gradients(
    grad: Tensor, x: Tensor | None, inner: Tensor, B: Tensor, needs_B: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of inner (N, R), of A (R, in_features) and of B (out_features, R) in x A^T B^T, where inner is x A^T.

    grad (N, out_features) and x (N, in_features) have the products' dtype; without x there is none of A.
    """
    if x is not None and needs_B:
        return torch.ops.lightning_peft.low_rank_gradients(grad, x, inner, B)
    grad_inner = grad @ B
    # Of the two ways to write the last product, the one that leaves the wide matrix as it lies.
    grad_B = (inner.t() @ grad).t().contiguous() if needs_B else None
    return grad_inner, None if x is None else grad_inner.t() @ x, grad_B


def can_redraw(x: Tensor) -> bool:
    """Whether a function may drop inputs of x and draw the same again in its backward pass.

    The compiler follows no generators, and decides by itself what it keeps.
    """
    return x.device.type in ("cpu", "cuda") and not torch.compiler.is_compiling()


class FusedAdapter(Adapter):
    """An adapter whose autograd function runs the base as well, wherever `frozen_base` knows the layer."""

    dropout: float

    def forward(self, x: Tensor) -> Tensor:
        if self.enabled and not self.merged and self.fuses(x):
            base = frozen_base(self.base_layer, x)
            if base is not None:
                return self.add_to(base, x)
        return super().forward(x)

    def adapt(self, x: Tensor, base_output: Tensor) -> Tensor:
        return self.add_to(given(base_output), x)

    @property
    def active_dropout(self) -> float:
        """The probability of dropping an input now: 0 outside training."""
        return self.dropout if self.training else 0.0

    def fuses(self, x: Tensor) -> bool:
        """Whether `add_to` takes a base that was not run yet."""
        return not self.active_dropout or can_redraw(x)

    @abstractmethod
    def add_to(self, base: Base, x: Tensor) -> Tensor:
        """Adapted output (..., out_features) of x (..., in_features)."""
