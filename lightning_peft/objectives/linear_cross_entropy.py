"""Cross entropy of an output head without ever holding the logits of all tokens.

The gradient of the hidden states is computed during the forward pass, a chunk of tokens at a time, so memory is
one chunk of logits; only supervised tokens reach the head at all.
"""

from collections.abc import Callable
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_peft.native import cross_entropy as native_loss

LOGIT_BYTES, MIN_CHUNK = 2**25, 256
"""fp32 logits of a chunk, and tokens that a chunk has whatever they take. Ours: on CPU larger ones were no faster."""
SOFTMAX_BYTES = 2**22
"""fp32 probabilities taken at a time on a CPU without the kernel. Ours: a third of the time that whole chunks take."""

LogitTransform = Callable[[Tensor], Tensor]


def chunk_tokens(vocabulary: int) -> int:
    """Tokens of a chunk, a multiple of 64, as kernels compute in tiles."""
    return max(MIN_CHUNK, LOGIT_BYTES // (4 * vocabulary) // 64 * 64)


def softmax_rows(vocabulary: int) -> int:
    """Tokens whose softmax torch takes at a time on a CPU, so that its passes find them in the cache."""
    return max(1, SOFTMAX_BYTES // (4 * vocabulary))


def cross_entropy_with_gradient_(logits: Tensor, labels: Tensor, transform: LogitTransform | None) -> Tensor:
    """Cross entropy (N, 1) of the rows of logits (N, V), which are overwritten by its gradient; labels (N, 1)."""
    transformed = logits
    if transform is not None:
        leaf = logits.float().requires_grad_()
        with torch.enable_grad():
            transformed = transform(leaf)
    values = transformed.detach()
    probabilities = F.softmax(values, -1, dtype=torch.float32)
    normalizers = values.amax(-1, keepdim=True) - probabilities.amax(-1, keepdim=True).log_()
    loss = normalizers - values.gather(1, labels)
    # softmax - onehot in fp32: near a certain prediction the difference is below bf16's resolution.
    gradient = probabilities.scatter_add_(1, labels, probabilities.new_full(labels.shape, -1))
    if transform is not None:
        (gradient,) = torch.autograd.grad(transformed, leaf, gradient)
    logits.copy_(gradient)
    return loss


def weighted_sum(losses: Tensor, weights: Tensor | None) -> Tensor:
    """Sum of losses (N,), each times its weight."""
    return losses.sum() if weights is None else losses @ weights


class FrozenHeadLoss(torch.autograd.Function):
    """Summed cross entropy of hidden (N, D) under a frozen head weight (V, D); gradient for hidden only."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        chunk: int,
        transform: LogitTransform | None,
        weights: Tensor | None,
    ) -> Tensor:
        loss = hidden.new_zeros((), dtype=torch.float32)
        # Of the weight's dtype: autocast does not reach a product with out=, and a layer norm under it gives fp32.
        hidden = hidden.to(weight.dtype)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Made once, written over by every chunk: a fresh tensor of this size costs the system a page fault per 4 KiB.
        buffer = weight.new_empty(min(chunk, hidden.shape[0]), weight.shape[0])
        rows = softmax_rows(weight.shape[0]) if hidden.device.type == "cpu" else chunk
        for start in range(0, hidden.shape[0], chunk):
            tokens = slice(start, start + chunk)
            logits = buffer[: hidden[tokens].shape[0]]
            if bias is None:
                torch.mm(hidden[tokens], weight.t(), out=logits)
            else:
                torch.addmm(bias, hidden[tokens], weight.t(), out=logits)
            # The compiler would copy what an operator writes over.
            if transform is None and not torch.compiler.is_compiling() and native_loss.takes(logits):
                token_losses = torch.ops.lightning_peft.cross_entropy_gradient_(logits, labels[tokens])
                loss += weighted_sum(token_losses, None if weights is None else weights[tokens])
            else:
                for place in range(start, start + logits.shape[0], rows):
                    part = slice(place, min(place + rows, start + logits.shape[0]))
                    part_logits = logits[place - start : part.stop - start]
                    token_losses = cross_entropy_with_gradient_(part_logits, labels[part][:, None], transform)
                    loss += weighted_sum(token_losses.squeeze(1), None if weights is None else weights[part])
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[tokens])
                if weights is not None:
                    grad_hidden[tokens] *= weights[tokens, None].to(grad_hidden.dtype)
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden * grads[0].to(grad_hidden.dtype), None, None, None, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    labels: Tensor,
    head: nn.Module,
    vocabulary: int,
    transform: LogitTransform | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Cross entropy summed over tokens, fp32 scalar.

    hidden (N, D) and labels (N,) int64, already shifted and without ignored positions; weights (N,) fp32 multiply the
    tokens' losses. `head` is any module from D to
    V = `vocabulary`, whose logits `transform` changes (softcap, scale). A frozen plain linear takes the fast path; a
    trained, adapted or quantised one recomputes its chunks in the backward pass.
    """
    chunk = chunk_tokens(vocabulary)
    if hidden.shape[0] == 0:
        return hidden.sum().float()
    if type(head) is nn.Linear and not any(p.requires_grad for p in head.parameters()):
        return FrozenHeadLoss.apply(hidden, head.weight, head.bias, labels, chunk, transform, weights)

    def chunk_loss(chunk_hidden: Tensor, chunk_labels: Tensor, chunk_weights: Tensor | None) -> Tensor:
        logits = head(chunk_hidden).float()
        logits = transform(logits) if transform else logits
        if chunk_weights is None:
            return F.cross_entropy(logits, chunk_labels, reduction="sum")
        return F.cross_entropy(logits, chunk_labels, reduction="none") @ chunk_weights

    chunks = zip(
        hidden.split(chunk),
        labels.split(chunk),
        repeat(None) if weights is None else weights.split(chunk),
        strict=False,
    )
    losses = [checkpoint(chunk_loss, *parts, use_reentrant=False) for parts in chunks]
    return torch.stack(losses).sum()
