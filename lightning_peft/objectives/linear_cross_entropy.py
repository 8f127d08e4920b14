"""Cross entropy of an output head without ever holding the logits of all tokens.

The gradient of the hidden states is computed during the forward pass, a chunk of tokens at a time, so memory is
one chunk of logits; only supervised tokens reach the head at all.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_TOKENS = 512
"""Tokens whose logits are held at once. Ours: at a vocabulary of 49,152 larger chunks were no faster on CPU."""

LogitTransform = Callable[[Tensor], Tensor]


class FrozenHeadLoss(torch.autograd.Function):
    """Summed cross entropy of hidden (N, D) under a frozen head weight (V, D); gradient for hidden only."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        loss = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
        for start in range(0, hidden.shape[0], CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            logits = F.linear(hidden[rows], weight, bias)
            chunk_labels = labels[rows, None]
            probabilities = logits.float()
            log_norm = torch.logsumexp(probabilities, dim=-1, keepdim=True)
            loss += (log_norm - probabilities.gather(1, chunk_labels)).sum()
            if grad_hidden is not None:
                # softmax - onehot in fp32: near a certain prediction the difference is below bf16's resolution.
                probabilities.sub_(log_norm).exp_()
                probabilities.scatter_add_(1, chunk_labels, probabilities.new_full(chunk_labels.shape, -1))
                torch.mm(probabilities.to(weight.dtype), weight, out=grad_hidden[rows])
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden * grads[0].to(grad_hidden.dtype), None, None, None


def linear_cross_entropy(
    hidden: Tensor, labels: Tensor, head: nn.Module, transform: LogitTransform | None = None
) -> Tensor:
    """Cross entropy summed over tokens, fp32 scalar.

    hidden (N, D) and labels (N,) int64, already shifted and without ignored positions. `head` is any module from D to
    V: a frozen plain linear takes the fast path; a trained, adapted or quantised one, or one whose logits are
    transformed (softcap, scale), recomputes its chunks in the backward pass.
    """
    if hidden.shape[0] == 0:
        return hidden.sum().float()
    if type(head) is nn.Linear and not head.weight.requires_grad and transform is None:
        return FrozenHeadLoss.apply(hidden, head.weight, head.bias, labels)

    def chunk_loss(chunk: Tensor, chunk_labels: Tensor) -> Tensor:
        logits = head(chunk).float()
        return F.cross_entropy(transform(logits) if transform else logits, chunk_labels, reduction="sum")

    losses = [
        checkpoint(chunk_loss, chunk, chunk_labels, use_reentrant=False)
        for chunk, chunk_labels in zip(hidden.split(CHUNK_TOKENS), labels.split(CHUNK_TOKENS), strict=True)
    ]
    return torch.stack(losses).sum()
