"""The calibration of a model's probabilities for the tokens of right answers."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_peft.adapters.inject import adapters
from lightning_peft.data.batch import IGNORED_LABEL, Batch
from lightning_peft.data.preferences import Standing
from lightning_peft.objectives.sft import SupervisedLoss

BINS = 15
"""Intervals of confidence of the expected calibration error (Guo et al. 2017, arXiv:1706.04599)."""


@dataclass
class Calibration:
    """Scores of the probabilities given to the next token, over all supervised tokens."""

    tokens: int
    accuracy: float
    """Share of tokens that are the likeliest."""
    nll: float
    """Mean of -log p of the right token, in nats."""
    brier: float
    """Mean of the squared distance between the probabilities and the right token's one-hot vector, from 0 to 2."""
    ece: float
    """Expected calibration error: the gap between confidence and accuracy, over bins weighted by their tokens."""
    entropy: float
    """Mean entropy of the probabilities, in nats."""
    bins: list[tuple[int, float, float]]
    """Tokens, mean confidence and accuracy of every bin that has tokens."""


class Tally:
    """Sums over tokens, batch by batch."""

    def __init__(self) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64)
        """Sums of right tokens, -log p, Brier score and entropy."""
        self.bins = torch.zeros(3, BINS, dtype=torch.float64)
        """Sums of tokens, confidence and right tokens of each bin."""

    def add(self, probabilities: Tensor, labels: Tensor) -> None:
        """Count tokens with probabilities (N, V), fp32, and right ones (N,)."""
        own = probabilities.gather(1, labels[:, None])[:, 0]
        confidence, guess = probabilities.max(1)
        right = (guess == labels).double()
        logs = probabilities.clamp_min(torch.finfo(torch.float32).tiny).log()
        brier = probabilities.square().sum(1) - 2 * own + 1
        found = (right, -logs.gather(1, labels[:, None]), brier, -(probabilities * logs).sum(1))
        self.sums += torch.stack([value.double().sum() for value in found]).cpu()
        places = (confidence * BINS).long().clamp(max=BINS - 1).cpu()
        for row, values in zip(self.bins, (torch.ones_like(right), confidence.double(), right), strict=True):
            row.index_add_(0, places, values.cpu())

    def result(self) -> Calibration:
        """Return the scores. Raises ValueError where no token was counted."""
        tokens = float(self.bins[0].sum())
        if not tokens:
            raise ValueError("data: its validation rows have no supervised token, so nothing can be scored")
        counts, confidences, rights = self.bins
        accuracy, nll, brier, entropy = (self.sums / tokens).tolist()
        bins = [(int(n), float(c / n), float(r / n)) for n, c, r in zip(counts, confidences, rights, strict=True) if n]
        return Calibration(
            int(tokens), accuracy, nll, brier, float((confidences - rights).abs().sum() / tokens), entropy, bins
        )


@dataclass(frozen=True)
class Way:
    """One way to get probabilities: the mean over passes of one or several models."""

    models: Sequence[PreTrainedModel]
    passes: int = 1
    drawing: Callable[[nn.Module], AbstractContextManager[None]] | None = None
    """The context in which a pass of a model is random."""


@contextmanager
def dropping(model: nn.Module, dropout: float) -> Iterator[None]:
    """Let adapters drop inputs with this probability, as in training (Gal and Ghahramani 2016, arXiv:1506.02142).

    Raises ValueError where no layer drops.
    """
    found = [layer for _, layer in adapters(model) if "dropout" in vars(layer)]
    if not found:
        raise ValueError(f"dropout={dropout}: the adapter's method drops nothing")
    before = [(layer.dropout, layer.training) for layer in found]
    for layer in found:
        layer.dropout, layer.training = dropout, True
    try:
        yield
    finally:
        for layer, (own, training) in zip(found, before, strict=True):
            layer.dropout, layer.training = own, training


def of_answers_to_give(batch: Batch) -> Batch:
    """Return a batch with the labels of chosen answers alone; one without preferences as it is."""
    if batch.standings is None:
        return batch
    bounds = batch.cu_seqlens[1:].to(batch.labels.device, torch.int64)
    places = torch.arange(batch.labels.numel(), device=batch.labels.device)
    samples = torch.searchsorted(bounds, places, right=True)
    is_chosen = (batch.standings == Standing.chosen).to(places.device)[samples].view_as(batch.labels)
    labels = batch.labels.masked_fill(~is_chosen, IGNORED_LABEL)
    return replace(batch, labels=labels, num_supervised=int((labels != IGNORED_LABEL).sum()))


@torch.inference_mode()
def calibration(way: Way, batches: Iterable[Batch], seed: int) -> Calibration:
    """Score the mean of the probabilities that all passes give; passes are drawn from the seed.

    For preference rows the tokens of chosen answers alone are scored.
    """
    objectives = [SupervisedLoss(model) for model in way.models]
    tally = Tally()
    torch.manual_seed(seed)
    for batch in batches:
        moved = of_answers_to_give(move_data_to_device(batch, way.models[0].device))
        if not moved.num_supervised:
            continue
        total: Tensor | None = None
        if not objectives[0].is_checked:
            for objective in objectives:
                objective.check(moved)
            # Where one model needs samples apart, all models have them apart, so that tokens come in one order.
            apart = any(objective.runs_apart for objective in objectives)
            for objective in objectives:
                objective.runs_apart = apart
        for objective in objectives:
            for _ in range(way.passes):
                with nullcontext() if way.drawing is None else way.drawing(objective.model):
                    logits, labels = objective.token_logits(moved)
                probabilities = F.softmax(logits, -1, dtype=torch.float32)
                total = probabilities if total is None else total.add_(probabilities)
        assert total is not None
        tally.add(total.div_(way.passes * len(objectives)), labels)
    return tally.result()
