"""Cross entropy of an output head without ever holding the logits of all tokens: a chunk of tokens at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_peft.kernels.cross_entropy import FrozenHeadLosses, LogitTransform, weighted_sum

LOGIT_BYTES, MIN_CHUNK = 2**25, 256
"""fp32 logits of a chunk, and tokens that a chunk has whatever they take. Ours: on CPU larger ones were no faster."""


def chunk_tokens(vocabulary: int) -> int:
    """Return how many tokens a chunk has, a multiple of 64, as kernels compute in tiles."""
    return max(MIN_CHUNK, LOGIT_BYTES // (4 * vocabulary) // 64 * 64)


def linear_token_losses(
    hidden: Tensor, labels: Tensor, head: nn.Module, vocabulary: int, transform: LogitTransform | None = None
) -> Tensor:
    """Return the cross entropy of each token, (N,) fp32; each has a gradient of its own.

    hidden (N, D) and labels (N,) int64, already shifted and without ignored positions. `head` is any module from D to
    V = `vocabulary`, whose logits `transform` changes (softcap, scale). A frozen plain linear takes the fast path; a
    trained, adapted or quantised one recomputes its chunks in the backward pass.
    """
    chunk = chunk_tokens(vocabulary)
    if hidden.shape[0] == 0:
        return hidden.sum(-1).float()
    if type(head) is nn.Linear and not any(p.requires_grad for p in head.parameters()):
        return FrozenHeadLosses.apply(hidden, head.weight, head.bias, labels, chunk, transform)

    def chunk_losses(chunk_hidden: Tensor, chunk_labels: Tensor) -> Tensor:
        logits = head(chunk_hidden).float()
        logits = transform(logits) if transform else logits
        return F.cross_entropy(logits, chunk_labels, reduction="none")

    chunks = zip(hidden.split(chunk), labels.split(chunk), strict=True)
    return torch.cat([checkpoint(chunk_losses, *parts, use_reentrant=False) for parts in chunks])


def linear_cross_entropy(
    hidden: Tensor,
    labels: Tensor,
    head: nn.Module,
    vocabulary: int,
    transform: LogitTransform | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Return `linear_token_losses` summed over tokens, fp32 scalar; weights (N,) fp32 multiply the tokens' losses."""
    return weighted_sum(linear_token_losses(hidden, labels, head, vocabulary, transform), weights)
