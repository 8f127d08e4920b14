"""Supervised fine-tuning: the summed next-token cross entropy of a batch under a causal language model."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_peft.data.batch import Batch
from lightning_peft.kernels.cross_entropy import weighted_sum
from lightning_peft.objectives.model_loss import ModelLoss
from lightning_peft.objectives.objective import Objective, ObjectiveConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # a start that trains nothing does without it


@dataclass
class SFTConfig(ObjectiveConfig):
    name: str = "sft"
    label_smoothing: float = 0.0
    """Share of a label's probability that is spread over the vocabulary while training; validation takes none."""
    noise_alpha: float = 0.0
    """Noise on the embeddings while training (NEFTune, arXiv:2310.05914): uniform up to alpha / sqrt(L d) for a sample
    of L tokens; the paper takes 5 to 15. 0 adds none."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"objective.label_smoothing={self.label_smoothing}: must be at least 0 and below 1")
        if not self.noise_alpha >= 0:
            raise ValueError(f"objective.noise_alpha={self.noise_alpha}: must be 0 or more")


class SupervisedLoss(ModelLoss):
    """The cross entropy of the answers; in training mode with smoothed labels and noise where they are asked for."""

    def __init__(self, model: "PreTrainedModel", packing: bool | str = "auto", config: SFTConfig | None = None):
        super().__init__(model, packing)
        if config is not None:
            self.label_smoothing, self.noise_alpha = config.label_smoothing, config.noise_alpha

    def forward(self, batch: Batch) -> Tensor:
        """Return the loss summed over the batch's `num_supervised` tokens, each times its weight, fp32 scalar."""
        readout = self.readout(batch)
        return weighted_sum(readout.losses(), readout.weights)


def check_run(run: Any, objective: SFTConfig) -> None:
    """Raise ValueError for noise in a model that is compiled whole."""
    if objective.noise_alpha and run.compile.name == "full":
        raise ValueError(
            f"objective.noise_alpha={objective.noise_alpha} compile=full: the noise is another for every batch, "
            "so that each would be compiled anew; use compile=blocks"
        )


OBJECTIVE = Objective(
    SFTConfig,
    lambda model, config, packing: SupervisedLoss(model, packing, config),
    formula="-log p(answer), per token",
    check=check_run,
)
