"""Keeping half of what a block's backward pass reads: what an elementwise operation made is made again from its inputs.

A gated feed-forward keeps silu(gate) and silu(gate) * up beside gate and up, a norm its output beside its input. One
pass over memory gives them back, and no matrix product runs twice. The tensors are read off the autograd graph, so any
model's blocks will do: a product, an activation function or a cast whose own inputs are kept anyway. A tensor that
several operations read, as three projections read a norm's output, is made once and let go after the last.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import Node, saved_tensors_hooks


class Kept(NamedTuple):
    """A tensor that nothing else gives back."""

    tensor: Tensor
    version: int
    """Number of times that it had been written to."""


@dataclass
class Readers:
    """The number of coming reads of an operation's output, and that output between the first read and the last."""

    left: int = 0
    output: Tensor | None = None


class Recomputed(NamedTuple):
    """A tensor that its operation gives back; `readers` is shared by all that keep it."""

    node: Node
    readers: Readers


READERS = "lightning_peft_readers"
"""Key of an operation's Readers in its `metadata`."""


def recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return `forward` with recomputation of its elementwise operations; torch.compile decides this by itself."""

    def recomputing_forward(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        with saved_tensors_hooks(keep, restore):
            return forward(*args, **kwargs)

    return recomputing_forward


def keep(tensor: Tensor) -> Kept | Recomputed:
    """Return what autograd holds in a tensor's place until the backward pass: the operation that made it, or itself."""
    node: Any = tensor.grad_fn
    if node is None or not is_recomputable(node):
        # Detached, for a tensor that its own operation saves would keep that operation alive.
        return Kept(tensor.detach(), tensor._version)
    if READERS not in node.metadata:
        node.metadata[READERS] = Readers()
        for function, _ in node.next_functions:
            if function is not None and READERS in function.metadata:
                function.metadata[READERS].left += 1  # making this one reads it once more
    readers: Readers = node.metadata[READERS]
    readers.left += 1
    return Recomputed(node, readers)


def restore(kept: Kept | Recomputed) -> Tensor:
    """Give back a kept tensor. Raises RuntimeError where it was written to, as autograd itself does."""
    if isinstance(kept, Kept):
        if kept.tensor._version != kept.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(kept.tensor.shape)} that the backward pass needs was modified in place"
            )
        return kept.tensor
    readers = kept.readers
    with torch.no_grad():
        made = output(kept.node) if readers.output is None else readers.output
    readers.left -= 1
    readers.output = made if readers.left > 0 else None
    return made


def is_recomputable(node: Node) -> bool:
    """Return whether `output(node)` works, without asking a tensor for its value."""
    inputs = [function for function, _ in node.next_functions]
    match node.name():
        case "SiluBackward0" | "GeluBackward0":
            return True
        case "MulBackward0":  # it saves each factor that the other's gradient needs
            return all(inputs) or any(function is not None and is_recomputable(function) for function in inputs)
        case "ToCopyBackward0":
            return inputs[0] is not None and is_recomputable(inputs[0])
    return False


def output(node: Any) -> Tensor:
    """Return what the operation returned in the forward pass, by the same operation on the same inputs."""
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
