"""The model as training began, with which some objectives compare: the same weights, and no second model."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_peft.adapters.base import AdapterConfig
from lightning_peft.adapters.bias import Bias
from lightning_peft.adapters.inject import disable_adapters
from lightning_peft.data.batch import Batch
from lightning_peft.data.preferences import Standing
from lightning_peft.kernels.divergence import Mix
from lightning_peft.objectives.linear_cross_entropy import Readout
from lightning_peft.objectives.linear_divergence import taught_token_losses
from lightning_peft.objectives.logits import in_eval_mode
from lightning_peft.objectives.model_loss import ModelLoss, TokenLosses

KL = "kl_per_token"
"""Measurement of a validation beside `measures`: the mean of KL(p || p_ref) over the tokens of the answers."""


def starts_as_base(adapter: AdapterConfig) -> bool:
    """Return whether the model with adapters off is the model that training starts from."""
    changes_more = adapter.trainable_modules or adapter.trained_biases is not Bias.none
    return adapter.initialization.is_neutral and adapter.init_from is None and not changes_more


class ReferencedLoss(ModelLoss, ABC):
    """A loss that compares with the reference: the base with adapters off, or the values that training started from."""

    measures: tuple[str, ...] = ()
    """Names of what `judged` measures."""
    uses_reference = True
    """True where the loss reads the reference, which is all zeros otherwise."""
    start: list[tuple[nn.Parameter, Tensor]] | None = None
    """Trained parameters with the values they started from; None where the start is the base with adapters off."""

    @abstractmethod
    def judged(self, batch: Batch, sums: Tensor, counts: Tensor, reference: Tensor) -> Tensor:
        """Return the losses of the batch's units summed, fp32 scalar, and leave what was measured in `measured`.

        Each argument has a value a sample, (S,) fp32, a unit's two samples one after the other: log-probabilities of
        the supervised tokens, their numbers, and the log-probabilities that the reference gives.
        """

    def loss_weight(self, batch: Batch) -> float:
        """Return the number of units: pairs, or labelled answers."""
        assert batch.num_units is not None, "rows of preferences"
        return batch.num_units

    def forward(self, batch: Batch) -> Tensor:
        """Return the losses summed over the batch's units, fp32 scalar; 0 for a batch without any."""
        if not self.is_checked:
            self.check(batch)
        start, reference = self.reference_readout(batch) if self.uses_reference else (None, None)
        if self.training:
            start = None  # validations alone need it, and logits are large
        readout = self.readout(batch)
        sums, counts = self.sums_of(batch, readout)
        loss = sums.sum() * 0
        if batch.num_units == 0:
            self.measured = dict.fromkeys(self.measures, (loss.detach(), loss.detach()))
        else:
            loss = self.judged(batch, sums, counts, torch.zeros_like(sums) if reference is None else reference)
        if start is not None:
            self.measured |= {KL: self.divergence_from(start, readout, batch)}
        return loss

    def sums_of(self, batch: Batch, readout: Readout) -> tuple[Tensor, Tensor]:
        """Return the log-probability of each sample's supervised tokens, and their number, (S,) fp32 each."""
        tokens = TokenLosses(readout.losses(), readout.samples, readout.weights)
        return self.sums_per_sample(batch, tokens)

    @torch.no_grad()
    def divergence_from(self, start: Readout, readout: Readout, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return KL(p || p_ref) over the whole vocabulary, summed over the tokens of the answers, and their number.

        It is that of the model's next-token distributions after each part of the given answers, in nats, and exact: an
        estimate from the answers' own log-probabilities would be of answers that the model has not written.
        """
        found = taught_token_losses(readout, start, Mix(weight=1.0, temperature=1.0, beta=1.0)).divergence
        counted = torch.ones_like(found)
        if batch.standings is not None:
            counted = (batch.standings.to(found.device) != Standing.mismatched).index_select(0, readout.samples).float()
        return found @ counted, counted.sum()

    def remember_start(self) -> None:
        """Take the present values of what trains for the reference: those of a warm start, or of a rewritten base."""
        self.start = [(p, p.detach().clone()) for p in self.model.parameters() if p.requires_grad]

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Make the model the reference, without gradients and dropout, in a block before the step's own forward."""
        with torch.no_grad(), in_eval_mode(self.model):
            if self.start is None:
                with disable_adapters(self.model):
                    yield
                return
            # This is in place: validation runs in inference mode, where a parameter would get another kind of tensor.
            now = [parameter.detach().clone() for parameter, _ in self.start]
            for parameter, value in self.start:
                parameter.copy_(value)
            try:
                yield
            finally:
                for (parameter, _), value in zip(self.start, now, strict=True):
                    parameter.copy_(value)

    def reference_readout(self, batch: Batch) -> tuple[Readout, Tensor]:
        """Return the reference's hidden states and head, and what it gives each sample, (S,) fp32; no gradients."""
        with self.as_reference():
            readout = self.readout(batch)
            sums, _ = self.sums_of(batch, readout)
        head = readout.head
        is_shared = isinstance(head, nn.Identity | nn.Linear) and not any(p.requires_grad for p in head.parameters())
        return (readout if is_shared else readout._replace(head=ReferenceHead(self))), sums


class ReferenceHead(nn.Module):
    """The adapted or trained head of a model as it was. For validation: it may write to weights a backward reads."""

    def __init__(self, loss: ReferencedLoss):
        super().__init__()
        self.loss = (loss,)  # the tuple keeps the model from being a part of its head

    def forward(self, hidden: Tensor) -> Tensor:
        (loss,) = self.loss
        with loss.as_reference():
            return loss.model.get_output_embeddings()(hidden)
