"""Supervised fine-tuning: the summed next-token cross entropy of a batch under a causal language model."""

from dataclasses import dataclass

from torch import Tensor

from lightning_peft.data.batch import Batch
from lightning_peft.kernels.cross_entropy import weighted_sum
from lightning_peft.objectives.model_loss import ModelLoss
from lightning_peft.objectives.objective import Objective, ObjectiveConfig


@dataclass
class SFTConfig(ObjectiveConfig):
    name: str = "sft"


class SupervisedLoss(ModelLoss):
    """The cross entropy of the answers."""

    def forward(self, batch: Batch) -> Tensor:
        """Return the loss summed over the batch's `num_supervised` tokens, each times its weight, fp32 scalar."""
        tokens = self.token_losses(batch)
        return weighted_sum(tokens.losses, tokens.weights)


OBJECTIVE = Objective(
    SFTConfig,
    lambda model, config, packing: SupervisedLoss(model, packing),
    formula="-log p(answer), per token",
)
