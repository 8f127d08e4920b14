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
from lightning_peft.objectives.logits import in_eval_mode
from lightning_peft.objectives.model_loss import ModelLoss


def starts_as_base(adapter: AdapterConfig) -> bool:
    """Return whether the model with adapters off is the model that training starts from."""
    changes_more = adapter.trainable_modules or adapter.trained_biases is not Bias.none
    return adapter.initialization.is_neutral and adapter.init_from is None and not changes_more


class ReferencedLoss(ModelLoss, ABC):
    """A loss that compares with the reference: the base with adapters off, or the values that training started from."""

    measures: tuple[str, ...] = ()
    """Names of what `judged` measures."""
    uses_reference = True
    """Whether the loss reads the reference; else it is all zeros."""
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
        reference = self.reference_log_probabilities(batch) if self.uses_reference else None
        sums, counts = self.sums_per_sample(batch, self.token_losses(batch))
        if batch.num_units == 0:
            zero = sums.sum() * 0
            self.measured = dict.fromkeys(self.measures, (zero.detach(), zero.detach()))
            return zero
        return self.judged(batch, sums, counts, torch.zeros_like(sums) if reference is None else reference)

    def remember_start(self) -> None:
        """Take the present values of what trains for the reference: those of a warm start, or of a rewritten base."""
        self.start = [(p, p.detach().clone()) for p in self.model.parameters() if p.requires_grad]

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Inside, the model is the reference, without gradients and dropout. Comes before the step's own forward."""
        with torch.no_grad(), in_eval_mode(self.model):
            if self.start is None:
                with disable_adapters(self.model):
                    yield
                return
            # In place: validation runs in inference mode, where a parameter would get another kind of tensor.
            now = [parameter.detach().clone() for parameter, _ in self.start]
            for parameter, value in self.start:
                parameter.copy_(value)
            try:
                yield
            finally:
                for (parameter, _), value in zip(self.start, now, strict=True):
                    parameter.copy_(value)

    def reference_log_probabilities(self, batch: Batch) -> Tensor:
        """Return what the reference gives each sample's supervised tokens, (S,) fp32, without a gradient."""
        with self.as_reference():
            return self.sums_per_sample(batch, self.token_losses(batch))[0]
