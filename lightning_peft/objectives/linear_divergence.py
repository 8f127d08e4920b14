"""Divergence of a model from its teacher over the vocabulary, with the logits of neither ever held for all tokens."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_peft.data.top_tokens import TopTokens
from lightning_peft.kernels.divergence import FrozenHeadTaughtLosses, Mix, divergence, in_fp32, mixed, taught_losses
from lightning_peft.objectives.linear_cross_entropy import Readout, chunk_tokens

CHUNKS_AT_ONCE, SMALLEST_CHUNK = 4, 64
"""A chunk is a fourth of the cross entropy's: some four times as many arrays of its size exist at once."""


class TaughtLosses(NamedTuple):
    """Losses of N tokens, (N,) fp32 each."""

    mixed: Tensor
    """(1 - weight) * cross entropy + weight * temperature^2 * divergence, with a gradient for the student alone."""
    cross_entropy: Tensor
    """Cross entropy without a gradient, as `divergence` is."""
    divergence: Tensor


def final_logits(readout: Readout, tokens: slice) -> Tensor:
    """Return the logits that the model itself would give these tokens, (n, V)."""
    hidden, head = readout.hidden[tokens], readout.head
    if type(head) is nn.Linear:
        # The product is in the weight's dtype, as the student's: two equal models are to give equal logits.
        with torch.autocast(hidden.device.type, enabled=False):
            logits = F.linear(hidden.to(head.weight.dtype), head.weight, head.bias)
    else:
        logits = head(hidden)
    return logits if readout.transform is None else readout.transform(in_fp32(logits))


def bucketed(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the log-probabilities of tokens `ids` (n, k) under logits (n, V), and of all others together, (n, k + 1).

    The shape is (n, k) where k is V, so that there are no others.
    """
    total = logits.logsumexp(-1, keepdim=True)
    own = logits.gather(1, ids) - total
    if ids.shape[1] == logits.shape[1]:
        return own
    others = logits.scatter(1, ids, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([own, others - total], 1)


def kept_token_losses(student: Readout, kept: TopTokens, mix: Mix) -> TaughtLosses:
    """Return the losses of each token of a readout beside a teacher's likeliest tokens, its others taken as one.

    With as many tokens kept as there are, they are those of `taught_token_losses`. Chunks are made again in the
    backward pass.
    """
    hidden, labels = student.hidden, student.labels
    if hidden.shape[0] == 0:
        zeros = hidden.sum(-1).float()
        return TaughtLosses(zeros, zeros.detach(), zeros.detach())
    chunk = max(SMALLEST_CHUNK, chunk_tokens(student.vocabulary, hidden.device.type) // CHUNKS_AT_ONCE // 64 * 64)

    def chunk_losses(chunk_hidden: Tensor, start: int) -> tuple[Tensor, Tensor]:
        tokens = slice(start, start + chunk)
        logits = in_fp32(final_logits(student._replace(hidden=chunk_hidden), slice(None)))
        cross_entropy = F.cross_entropy(logits, labels[tokens], reduction="none")
        own = bucketed(logits[:, : kept.vocabulary] / mix.temperature, kept.ids[tokens])
        return cross_entropy, divergence(own, kept.log_probabilities[tokens], mix.beta)

    parts = [
        checkpoint(chunk_losses, part, start, use_reentrant=False)
        for part, start in zip(hidden.split(chunk), range(0, len(hidden), chunk), strict=True)
    ]
    cross_entropy, diverged = (torch.cat(losses) for losses in zip(*parts, strict=True))
    return TaughtLosses(mixed(cross_entropy, diverged, mix), cross_entropy.detach(), diverged.detach())


def taught_token_losses(student: Readout, teacher: Readout, mix: Mix) -> TaughtLosses:
    """Return the losses of each token of two readouts of one batch; the teacher's gets no gradient.

    A frozen plain head takes the fast path; any other recomputes its chunks in the backward pass.
    """
    hidden, head, transform, labels = student[:4]
    if hidden.shape[0] == 0:
        zeros = hidden.sum(-1).float()
        return TaughtLosses(zeros, zeros.detach(), zeros.detach())
    largest = max(student.vocabulary, teacher.vocabulary)
    chunk = max(SMALLEST_CHUNK, chunk_tokens(largest, hidden.device.type) // CHUNKS_AT_ONCE // 64 * 64)

    @torch.no_grad()
    def taught(tokens: slice) -> Tensor:
        return final_logits(teacher, tokens)

    if type(head) is nn.Linear and not any(p.requires_grad for p in head.parameters()):
        return TaughtLosses(
            *FrozenHeadTaughtLosses.apply(hidden, head.weight, head.bias, labels, taught, chunk, transform, mix)
        )

    def chunk_losses(chunk_hidden: Tensor, start: int) -> tuple[Tensor, Tensor]:
        tokens = slice(start, start + chunk)
        logits = head(chunk_hidden)
        logits = logits if transform is None else transform(in_fp32(logits))
        return taught_losses(logits, taught(tokens), labels[tokens], mix)

    parts = [
        checkpoint(chunk_losses, part, start, use_reentrant=False)
        for part, start in zip(hidden.split(chunk), range(0, len(hidden), chunk), strict=True)
    ]
    cross_entropy, divergence = (torch.cat(losses) for losses in zip(*parts, strict=True))
    return TaughtLosses(mixed(cross_entropy, divergence, mix), cross_entropy.detach(), divergence.detach())
