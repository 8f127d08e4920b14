"""The scores of smaller ranks: an adapter cut by SVD to half its rank again and again, scored without training."""

from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from lightning_peft.adapters.base import LowRank
from lightning_peft.adapters.changes import Change, inject_changes, take_out_adapters
from lightning_peft.adapters.combine import Cut, cut, cut_dense
from lightning_peft.data.batch import Batch
from lightning_peft.data.preferences import Standing
from lightning_peft.objectives.sft import SupervisedLoss
from lightning_peft.progress import Part

RESAMPLES = 10_000
"""Draws of rows, with replacement, behind an interval."""
ROUNDING = 1e-5
"""Difference of losses, nats per token, that fp32 sums make of one adapter written in other factors."""
RANK_OF_DENSE = 64
"""Largest rank tried of a change that has none of its own. Ours."""


@dataclass(frozen=True)
class RankScore:
    """The adapter cut to a rank, beside the whole one on the same rows."""

    rank: int
    loss: float
    """The loss per supervised token, in nats."""
    difference: float
    """The difference to the loss of the whole adapter."""
    interval: tuple[float, float]
    """The middle 95 % of the differences of resampled rows."""

    @property
    def is_worse(self) -> bool:
        """Return whether the difference is above what other rows of the same kind would make of it."""
        return self.interval[0] > ROUNDING


@torch.inference_mode()
def row_losses(model: PreTrainedModel, batches: Iterable[Batch]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the cross entropy of every row's supervised tokens, summed, and what they count; (rows,) each.

    In preference rows the chosen answers alone count.
    """
    objective = SupervisedLoss(model)
    sums: list[Tensor] = []
    counts: list[Tensor] = []
    with Part("loss of the validation rows", len(batches) if isinstance(batches, Sized) else None) as part:
        for batch in batches:
            moved = move_data_to_device(batch, model.device)
            tokens = objective.token_losses(moved)
            weights = torch.ones_like(tokens.losses) if tokens.weights is None else tokens.weights
            zeros = tokens.losses.new_zeros(moved.cu_seqlens.numel() - 1, dtype=torch.float64)
            total = zeros.index_add(0, tokens.samples, (weights * tokens.losses).double())
            count = zeros.index_add(0, tokens.samples, weights.double())
            kept = count > 0
            if moved.standings is not None:
                kept &= moved.standings == Standing.chosen
            sums.append(total[kept].cpu())
            counts.append(count[kept].cpu())
            part.advance()
    return torch.cat(sums).numpy(), torch.cat(counts).numpy()


def halves(rank: int) -> list[int]:
    """Return half of a rank, half of that and so on down to 1."""
    found = []
    while rank > 1:
        rank //= 2
        found.append(rank)
    return found


def score_ranks(
    model: PreTrainedModel, changes: Mapping[str, Change], largest: int | None, batches: Iterable[Batch]
) -> tuple[float, list[RankScore]]:
    """Return the loss of an adapted model, and the scores of its halved ranks; the model ends as its base.

    `changes` are those of the model's layers; `largest` is the rank that is halved, None for a method without one.
    """
    sums, counts = row_losses(model, batches)
    take_out_adapters(model)
    largest = largest or RANK_OF_DENSE
    parts = {
        name: (cut_dense(change, Cut(largest)) if isinstance(change, Tensor) else cut(change, Cut(largest)))[0]
        for name, change in changes.items()
    }
    largest = min(largest, max(len(part.A) for part in parts.values()))
    scores = []
    for rank in halves(largest):
        # The directions lie in order of their size, so a cut is the first of them.
        inject_changes(model, {name: LowRank(A[:rank], B[:, :rank], s) for name, (A, B, s) in parts.items()}, "lora")
        model.eval()
        of_cut, _ = row_losses(model, batches)
        take_out_adapters(model)
        interval = resampled(of_cut - sums, counts)
        loss, whole = of_cut.sum() / counts.sum(), sums.sum() / counts.sum()
        scores.append(RankScore(rank, float(loss), float(loss - whole), interval))
    return float(sums.sum() / counts.sum()), scores


def resampled(differences: NDArray[np.float64], counts: NDArray[np.float64], seed: int = 0) -> tuple[float, float]:
    """Return the middle 95 % of sum of differences / sum of counts over rows drawn with replacement."""
    draws = np.random.default_rng(seed).integers(len(counts), size=(RESAMPLES, len(counts)))
    means = differences[draws].sum(1) / counts[draws].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def smallest_as_good(scores: Sequence[RankScore]) -> RankScore | None:
    """Return the smallest rank down to which no cut is worse than the whole adapter; None where the first one is."""
    found = None
    for score in scores:
        if score.is_worse:
            return found
        found = score
    return found
