"""Keeping half of what a block's backward pass reads: what an elementwise operation made is made again from its inputs.

A gated feed-forward keeps silu(gate) and silu(gate) * up beside gate and up, a norm its output beside its input. One
pass over memory gives them back, and no matrix product runs twice. Which tensors those are is read off the autograd
graph, so any model's blocks will do: a product, an activation function or a cast whose own inputs are kept anyway.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import Node, saved_tensors_hooks


class Kept(NamedTuple):
    """A tensor that nothing else gives back."""

    tensor: Tensor
    version: int
    """How often it had been written to."""


def recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` with recomputation of its elementwise operations; torch.compile decides this by itself."""

    def recomputing_forward(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        with saved_tensors_hooks(keep, restore):
            return forward(*args, **kwargs)

    return recomputing_forward


def keep(tensor: Tensor) -> Kept | Node:
    """What autograd holds in a tensor's place until the backward pass: the operation that made it, or itself."""
    if tensor.grad_fn is not None and is_recomputable(tensor.grad_fn):
        return tensor.grad_fn
    # Detached, for a tensor that its own operation saves would keep that operation alive.
    return Kept(tensor.detach(), tensor._version)


def restore(kept: Kept | Node) -> Tensor:
    """RuntimeError where a kept tensor was written to, as autograd itself raises."""
    if isinstance(kept, Kept):
        if kept.tensor._version != kept.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(kept.tensor.shape)} that the backward pass needs was modified in place"
            )
        return kept.tensor
    with torch.no_grad():
        return output(kept)


def is_recomputable(node: Node) -> bool:
    """Whether `output(node)` works; asks no tensor for its value."""
    inputs = [function for function, _ in node.next_functions]
    match node.name():
        case "SiluBackward0" | "GeluBackward0":
            return True
        case "MulBackward0":  # saves each factor that the other's gradient needs
            return all(inputs) or any(function is not None and is_recomputable(function) for function in inputs)
        case "ToCopyBackward0":
            return inputs[0] is not None and is_recomputable(inputs[0])
    return False


def output(node: Any) -> Tensor:
    """What the operation returned in the forward pass, by the same operation on the same inputs."""
    inputs = [function for function, _ in node.next_functions]
    made = node._input_metadata[0]
    match node.name():
        case "SiluBackward0":
            return F.silu(node._saved_self)
        case "GeluBackward0":
            return F.gelu(node._saved_self, approximate=node._saved_approximate)
        case "ToCopyBackward0":
            return output(inputs[0]).to(made.device, made.dtype)
    factors = (node._saved_self, node._saved_other)
    first, second = (
        output(function) if factor is None else factor for factor, function in zip(factors, inputs, strict=True)
    )
    return (first * second).to(made.dtype)  # a Python number comes back as an fp64 tensor
