"""KTO: answers that a label wants or does not want, without pairs (Ethayarajh et al. 2024, arXiv:2402.01306)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_peft.data.batch import Batch
from lightning_peft.data.config import RowKind
from lightning_peft.data.preferences import Standing
from lightning_peft.objectives.objective import Objective, ObjectiveConfig
from lightning_peft.objectives.preference import check_above_zero
from lightning_peft.objectives.reference import ReferencedLoss

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # a start that trains nothing does without it

MEASURED = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "kl")


@dataclass
class KTOConfig(ObjectiveConfig):
    name: str = "kto"
    beta: float = 0.1
    """Price of leaving the reference: the smaller, the further the model goes."""
    desirable_weight: float = 1.0
    """Factor of the losses of wanted answers; with other numbers of each kind, bring weight x number near 1 to 4/3."""
    undesirable_weight: float = 1.0
    """Factor of the losses of unwanted answers."""

    def __post_init__(self) -> None:
        check_above_zero(
            beta=self.beta, desirable_weight=self.desirable_weight, undesirable_weight=self.undesirable_weight
        )


class KTOLoss(ReferencedLoss):
    """1 - sigmoid(beta (r - z)) for wanted answers, 1 - sigmoid(beta (z - r)) for others, r = log(p / p_ref), summed.

    z is the distance to the reference, from prompts with the answers to other prompts. No gradient goes through it, so
    it is taken from the optimiser step before, over all its rows and ranks: no loss depends on how a step is cut, where
    the paper takes it from the micro batch. It is 0 in the first step, where model and reference are the same.
    """

    measures = MEASURED

    def __init__(self, model: "PreTrainedModel", config: KTOConfig, packing: bool | str):
        super().__init__(model, packing)
        self.config = config
        self.distance: Tensor | None = None
        """z, fp32 scalar; None before the first step."""

    def judged(self, batch: Batch, sums: Tensor, counts: Tensor, reference: Tensor) -> Tensor:
        assert batch.standings is not None
        wanted = (batch.standings.to(sums.device) == Standing.chosen).view(-1, 2)[:, 0]
        answer, mismatched = (sums - reference).view(-1, 2).unbind(1)
        log_probability = sums.detach().view(-1, 2)[:, 0]
        beta, distance = self.config.beta, 0.0 if self.distance is None else self.distance.to(sums.device)
        gains = torch.where(wanted, answer - distance, distance - answer)
        weights = torch.where(wanted, self.config.desirable_weight, self.config.undesirable_weight)
        rewards, unwanted = beta * answer.detach(), ~wanted
        self.measured = {
            "rewards/chosen": ((rewards * wanted).sum(), wanted.float().sum()),
            "rewards/rejected": ((rewards * unwanted).sum(), unwanted.float().sum()),
            "logps/chosen": ((log_probability * wanted).sum(), wanted.float().sum()),
            "logps/rejected": ((log_probability * unwanted).sum(), unwanted.float().sum()),
            "kl": (mismatched.detach().sum(), torch.ones_like(rewards).sum()),
        }
        return (weights * (1 - torch.sigmoid(beta * gains))).sum()

    def after_step(self, measured: dict[str, Tensor]) -> None:
        found = measured["kl"].float().clamp(min=0)
        before = torch.zeros_like(found) if self.distance is None else self.distance.to(found.device)
        self.distance = torch.where(found.isfinite(), found, before)  # the step may be left out

    def step_state(self) -> dict[str, Tensor]:
        return {} if self.distance is None else {"distance": self.distance}

    def load_step_state(self, state: dict[str, Tensor]) -> None:
        self.distance = state.get("distance")


OBJECTIVE = Objective(
    KTOConfig,
    KTOLoss,
    rows=RowKind.labelled,
    uses_reference=True,
    logs=MEASURED,
    formula="1 - sigmoid(beta (r - z)) wanted, 1 - sigmoid(beta (z - r)) not",
    paper="arXiv:2402.01306",
)
