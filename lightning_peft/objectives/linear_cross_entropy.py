"""Cross entropy of an output head without ever holding the logits of all tokens: a chunk of tokens at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_peft.adapters.inject import computes_in
from lightning_peft.kernels.cross_entropy import FrozenHeadLosses, LogitTransform, TrainedHeadLosses, weighted_sum

LOGIT_BYTES, MIN_CHUNK = {"cpu": 2**25, "cuda": 2**30}, 256
"""fp32 logits of a chunk by device, and tokens that a chunk has whatever they take.

Ours: on a CPU larger ones were no faster; a GPU reads the whole head for every chunk.
"""
_pretended: ContextVar[str | None] = ContextVar("device whose chunks are taken", default=None)


def chunk_tokens(vocabulary: int, device: str = "cpu") -> int:
    """Return how many tokens a chunk has on cpu or cuda, a multiple of 64, as kernels compute in tiles."""
    size = LOGIT_BYTES.get(_pretended.get() or device, LOGIT_BYTES["cuda"])
    return max(MIN_CHUNK, size // (4 * vocabulary) // 64 * 64)


@contextmanager
def chunks_as_on(device: str) -> Iterator[None]:
    """Take the chunks of cpu or cuda, inside the block, wherever the tensors are: an estimate computes on the host."""
    token = _pretended.set(device)
    try:
        yield
    finally:
        _pretended.reset(token)


class Readout(NamedTuple):
    """The supervised tokens of a batch before the output head, N of them, in the order of their samples."""

    hidden: Tensor
    """(N, D), what the head is fed; (N, V) final logits where they are not rebuilt here, `head` being an identity."""
    head: nn.Module
    transform: LogitTransform | None
    """Function that the head's output goes through."""
    labels: Tensor
    """(N,) int64, the tokens."""
    samples: Tensor
    """(N,) int64, the sample each belongs to, counted through the batch."""
    weights: Tensor | None
    """(N,) fp32, the factor of each; None where all are 1."""
    vocabulary: int
    """V, tokens that the head has rows for."""
    smoothing: float = 0.0
    """Share of a label's probability that all tokens get."""

    def losses(self) -> Tensor:
        """Return the cross entropy of each token, (N,) fp32, each with a gradient of its own."""
        hidden, head, labels = self.hidden, self.head, self.labels
        if type(head) is nn.Identity:
            return F.cross_entropy(hidden.float(), labels, reduction="none", label_smoothing=self.smoothing)
        return linear_token_losses(hidden, labels, head, self.vocabulary, self.transform, self.smoothing)


def linear_token_losses(
    hidden: Tensor,
    labels: Tensor,
    head: nn.Module,
    vocabulary: int,
    transform: LogitTransform | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """Return the cross entropy of each token, (N,) fp32; each has a gradient of its own.

    hidden (N, D) and labels (N,) int64, already shifted and without ignored positions. `head` is any module from D to
    V = `vocabulary`, whose logits `transform` changes (softcap, scale). A frozen plain linear takes the fast path; any
    other recomputes its chunks in the backward pass, one that trains in fp32 beside 16-bit activations in their dtype.
    `smoothing` is that of torch's cross_entropy(label_smoothing=).
    """
    chunk = chunk_tokens(vocabulary, hidden.device.type)
    if hidden.shape[0] == 0:
        return hidden.sum(-1).float()
    if type(head) is nn.Linear and not any(p.requires_grad for p in head.parameters()):
        return FrozenHeadLosses.apply(hidden, head.weight, head.bias, labels, chunk, transform, smoothing)

    if type(head) is nn.Linear and computes_in(head) == hidden.dtype:
        return TrainedHeadLosses.apply(hidden, head.weight, head.bias, labels, chunk, transform, smoothing)

    def chunk_losses(chunk_hidden: Tensor, chunk_labels: Tensor) -> Tensor:
        logits = head(chunk_hidden).float()
        logits = transform(logits) if transform else logits
        return F.cross_entropy(logits, chunk_labels, reduction="none", label_smoothing=smoothing)

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
