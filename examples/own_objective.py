"""An objective of one's own: focal loss, which counts tokens less the surer the model is of them already.

    lightning-peft train imports=[own_objective] objective=focal objective.focus=1 model=tiny

Run it where this file lies, or with its folder on PYTHONPATH.
"""

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from lightning_peft.data.batch import Batch
from lightning_peft.objectives.model_loss import ModelLoss
from lightning_peft.objectives.objective import Objective, ObjectiveConfig
from lightning_peft.objectives.registry import OBJECTIVES


@dataclass
class FocalConfig(ObjectiveConfig):
    name: str = "focal"
    focus: float = 2.0
    """Power of the probability missed, gamma in arXiv:1708.02002; 0 is cross entropy."""

    def __post_init__(self) -> None:
        if self.focus < 0:
            raise ValueError(f"objective.focus={self.focus}: must be 0 or more")


class FocalLoss(ModelLoss):
    """Sum over supervised tokens of -(1 - p)^focus log p, p being what the model gives the token."""

    def __init__(self, model: PreTrainedModel, config: FocalConfig, packing: bool | str):
        super().__init__(model, packing)
        self.focus = config.focus

    def forward(self, batch: Batch) -> Tensor:
        losses = self.token_losses(batch).losses
        missed = 1 - (-losses).exp()
        self.measured = {"missed": (missed.detach().sum(), losses.new_tensor(float(len(losses))))}
        return (missed.clamp(min=1e-9) ** self.focus * losses).sum()


OBJECTIVES["focal"] = Objective(FocalConfig, FocalLoss, logs=("missed",), paper="arXiv:1708.02002")
