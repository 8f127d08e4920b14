"""Cross entropy under a frozen output head, whose gradient is computed during the forward pass.

A chunk of tokens at a time makes its logits, its loss and its gradient, so that memory is one chunk of logits. Loss and
gradient of a chunk come from the compiled kernel (native/cross_entropy.cpp) or, anywhere, from torch.
"""

from collections.abc import Callable
from ctypes import c_int, c_long
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_peft.kernels.native.library import LANES, address, kernels, library
from lightning_peft.kernels.products import summed_product

SOFTMAX_BYTES = 2**22
"""fp32 probabilities taken at a time on a CPU without the kernel. Ours: a third of the time that whole chunks take."""

LogitTransform = Callable[[Tensor], Tensor]

torch.library.define("lightning_peft::cross_entropy_gradient_", "(Tensor(a!) logits, Tensor labels) -> Tensor")


def takes(logits: Tensor) -> bool:
    """Return whether there is a kernel for these logits on this machine."""
    suits = logits.dtype == torch.bfloat16 and logits.device.type == "cpu" and logits.shape[1] % LANES == 0
    return suits and library() is not None


@torch.library.impl("lightning_peft::cross_entropy_gradient_", "CPU")
def cross_entropy_gradient_(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross entropy of each row, (N,) fp32, and overwrite the logits with its gradient.

    logits (N, V) bf16; labels (N,) int64, below V.
    """
    assert logits.is_contiguous() and logits.dtype == torch.bfloat16 and labels.dtype == torch.int64
    rows, vocabulary = logits.shape
    if labels.amin() < 0 or labels.amax() >= vocabulary:
        raise IndexError(f"labels from {labels.amin()} to {labels.amax()}: must be in [0, {vocabulary})")
    labels = labels.contiguous()
    losses = logits.new_empty(rows, dtype=torch.float32)
    threads = c_int(torch.get_num_threads())
    kernels().cross_entropy_gradient(
        address(logits), address(labels), c_long(rows), c_long(vocabulary), address(losses), threads
    )
    return losses


@torch.library.register_fake("lightning_peft::cross_entropy_gradient_")
def _(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.new_empty(len(logits), dtype=torch.float32)


def softmax_rows(vocabulary: int) -> int:
    """Return how many tokens' softmax torch takes at a time on a CPU, so that its passes find them in the cache."""
    return max(1, SOFTMAX_BYTES // (4 * vocabulary))


def cross_entropy_with_gradient_(
    logits: Tensor, labels: Tensor, transform: LogitTransform | None, smoothing: float = 0.0
) -> Tensor:
    """Return the cross entropy (N, 1) of logits (N, V), and overwrite them with its gradient; labels (N, 1).

    With smoothing the label has so much less than one, which all tokens share: log Z - (1 - s) z_label - s mean(z).
    """
    transformed = logits
    if transform is not None:
        leaf = logits.float().requires_grad_()
        with torch.enable_grad():
            transformed = transform(leaf)
    values = transformed.detach()
    probabilities = F.softmax(values, -1, dtype=torch.float32)
    normalizers = values.amax(-1, keepdim=True) - probabilities.amax(-1, keepdim=True).log_()
    loss = normalizers - (1 - smoothing) * values.gather(1, labels).float()
    if smoothing:
        loss -= smoothing * values.mean(-1, keepdim=True, dtype=torch.float32)
    # softmax - onehot in fp32: near a certain prediction the difference is below bf16's resolution.
    gradient = probabilities.scatter_add_(1, labels, probabilities.new_full(labels.shape, smoothing - 1))
    if smoothing:
        gradient -= smoothing / logits.shape[1]
    if transform is not None:
        (gradient,) = torch.autograd.grad(transformed, leaf, gradient)
    logits.copy_(gradient)
    return loss


def weighted_sum(losses: Tensor, weights: Tensor | None) -> Tensor:
    """Return the sum of losses (N,), each times its weight."""
    return losses.sum() if weights is None else losses @ weights


def write_logits_(logits: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Overwrite logits (N, V) with those of hidden (N, D) under a head of weight (V, D)."""
    if bias is None:
        torch.mm(hidden, weight.t(), out=logits)
    else:
        torch.addmm(bias, hidden, weight.t(), out=logits)


class FrozenHeadLosses(torch.autograd.Function):
    """Cross entropy (N,) of each row of hidden (N, D) under a frozen head weight (V, D); gradient for hidden only.

    The gradient of a row's own loss is kept from the forward pass, so the backward pass only scales rows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        chunk: int,
        transform: LogitTransform | None,
        smoothing: float = 0.0,
    ) -> Tensor:
        losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        # The dtype is the weight's: autocast does not reach a product with out=, and a layer norm under it gives fp32.
        hidden = hidden.to(weight.dtype)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # The buffer is made once and written over by every chunk: a fresh one costs the system a page fault per 4 KiB.
        buffer = weight.new_empty(min(chunk, hidden.shape[0]), weight.shape[0])
        rows = softmax_rows(weight.shape[0]) if hidden.device.type == "cpu" else chunk
        for start in range(0, hidden.shape[0], chunk):
            tokens = slice(start, start + chunk)
            logits = buffer[: hidden[tokens].shape[0]]
            write_logits_(logits, hidden[tokens], weight, bias)
            # The compiler would copy what an operator writes over.
            plain = transform is None and not smoothing
            if plain and not torch.compiler.is_compiling() and takes(logits):
                losses[tokens] = torch.ops.lightning_peft.cross_entropy_gradient_(logits, labels[tokens])
            else:
                for place in range(start, start + logits.shape[0], rows):
                    part = slice(place, min(place + rows, start + logits.shape[0]))
                    part_logits = logits[place - start : part.stop - start]
                    if grad_hidden is None:
                        values = part_logits.float() if transform is None else transform(part_logits.float())
                        losses[part] = F.cross_entropy(
                            values, labels[part], reduction="none", label_smoothing=smoothing
                        )
                    else:
                        own = cross_entropy_with_gradient_(part_logits, labels[part][:, None], transform, smoothing)
                        losses[part] = own.flatten()
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[tokens])
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden * grads[0][:, None].to(grad_hidden.dtype), None, None, None, None, None, None


class TrainedHeadLosses(torch.autograd.Function):
    """Cross entropy (N,) of each row of 16-bit hidden (N, D) under a head whose weight (V, D) trains in fp32.

    The weight is cast once and the products are those of a frozen head, as autocast has them; the weight's gradient is
    summed over the tokens in fp32. Logits exist a chunk at a time, and are computed again in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        chunk: int,
        transform: LogitTransform | None,
        smoothing: float = 0.0,
    ) -> Tensor:
        losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        cast = weight.to(hidden.dtype)
        for start in range(0, hidden.shape[0], chunk):
            tokens = slice(start, start + chunk)
            logits = _logits(hidden[tokens], cast, bias).float()
            values = logits if transform is None else transform(logits)
            losses[tokens] = F.cross_entropy(values, labels[tokens], reduction="none", label_smoothing=smoothing)
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.chunk, ctx.transform, ctx.smoothing = chunk, transform, smoothing
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels = ctx.saved_tensors
        cast = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        for start in range(0, hidden.shape[0], ctx.chunk):
            tokens = slice(start, start + ctx.chunk)
            logits = _logits(hidden[tokens], cast, bias)
            cross_entropy_with_gradient_(logits, labels[tokens][:, None], ctx.transform, ctx.smoothing)
            logits *= grads[0][tokens, None].to(logits.dtype)
            torch.mm(logits, cast, out=grad_hidden[tokens])
            grad_weight += summed_product(logits.t(), hidden[tokens])
            if grad_bias is not None:
                grad_bias += logits.sum(0, dtype=grad_bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return hidden @ weight.t() if bias is None else torch.addmm(bias.to(hidden.dtype), hidden, weight.t())
