"""The product of a frozen linear layer, inside the autograd function of the low-rank change beside it.

In one function the input's two gradients are added up by a matrix product, not by a pass of their own over a tensor
made for it, and autograd runs one node a layer. What such a function is told of the layer is a `Base`.
"""

from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter
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


def base_output(x: Tensor, base: Base) -> Tensor:
    """x W^T + bias, (..., out_features), in a tensor that may be written over. x has the products' dtype."""
    if base.form == GIVEN:
        return base.first
    *weight, bias = base.tensors
    if base.form != DENSE:
        return torch.ops.lightning_peft.matmul_4bit(x, *weight, bias, base.form, base.block_size, True)
    matrix = _dense(base).t()
    if torch.compiler.is_compiling():
        return x @ matrix if bias is None else x @ matrix + bias.to(base.dtype)
    # Into a tensor of its own: a view made in here could not be written over by what comes later.
    output = x.new_empty(*x.shape[:-1], matrix.shape[1])
    rows, into = x.reshape(-1, x.shape[-1]), output.view(-1, matrix.shape[1])
    if bias is None:
        torch.mm(rows, matrix, out=into)
    else:
        torch.addmm(bias.to(base.dtype), rows, matrix, out=into)
    return output


def base_input_gradient(grad: Tensor, base: Base) -> Tensor:
    """grad W, (N, in_features), a new tensor, from grad (N, out_features)."""
    if base.form == DENSE:
        return grad @ _dense(base)
    *weight, _ = base.tensors
    return torch.ops.lightning_peft.matmul_4bit(grad, *weight, None, base.form, base.block_size, False)


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


# A schema and a kernel alone: the checks of torch.library.custom_op take longer than what this saves.
torch.library.define("lightning_peft::add_product_", "(Tensor(a!) output, Tensor inner, Tensor matrix) -> ()")


@torch.library.impl("lightning_peft::add_product_", "CompositeExplicitAutograd")
def _(output: Tensor, inner: Tensor, matrix: Tensor) -> None:
    output.addmm_(inner, matrix)


COMPILES_WRITES = torch.__version__ >= "2.13"
"""torch 2.11 compiles a function that writes in place to one without gradients."""


def add_product(output: Tensor, inner: Tensor, matrix: Tensor, base: Base) -> Tensor:
    """output + inner matrix, where `output` is the base's output or the gradient of its input.

    Written over `output` wherever that is possible: the compiler cannot follow `mark_dirty`, which a given one needs.
    """
    rows = output.view(-1, output.shape[-1])
    if not torch.compiler.is_compiling():
        rows.addmm_(inner, matrix)
        return output
    if base.form != GIVEN and COMPILES_WRITES:
        # The compiler's own addmm copies what it adds to.
        torch.ops.lightning_peft.add_product_(rows, inner, matrix)
        return output
    return torch.addmm(rows, inner, matrix).view(output.shape)


def mark_written(ctx: Any, base: Base, output: Tensor) -> None:
    """Tell autograd when the function's output is its input, written over."""
    if base.form == GIVEN and not torch.compiler.is_compiling():
        ctx.mark_dirty(output)


def input_gradient(grad: Tensor, base: Base, grad_inner: Tensor, A: Tensor) -> Tensor:
    """grad W + grad_inner A, (N, in_features), a new tensor; of a given base the second alone."""
    if base.form == GIVEN:
        return grad_inner @ A
    return add_product(base_input_gradient(grad, base), grad_inner, A, base)


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
