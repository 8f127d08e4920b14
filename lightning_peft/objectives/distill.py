"""Distillation: the answers' tokens, and at each of them a teacher's whole distribution (Hinton et al. 2015)."""

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_peft.data.batch import Batch
from lightning_peft.kernels.cross_entropy import weighted_sum
from lightning_peft.kernels.divergence import Mix
from lightning_peft.objectives.linear_divergence import kept_token_losses, taught_token_losses
from lightning_peft.objectives.objective import Objective
from lightning_peft.objectives.teacher import TaughtConfig, TaughtLoss, check_run

if TYPE_CHECKING:
    pass  # a start that trains nothing does without it

MEASURED = ("cross_entropy", "divergence")
"""Means over supervised tokens that are logged, neither with its factor in the loss."""


class Divergence(Enum):
    """The distance of the student's distribution p from the teacher's q."""

    forward_kl = "forward_kl"
    reverse_kl = "reverse_kl"
    jsd = "jsd"


@dataclass
class DistillConfig(TaughtConfig):
    name: str = "distill"
    weight: float = 0.5
    """w in (1 - w) * cross entropy + w * temperature^2 * divergence, over supervised tokens (Hinton et al. 2015,
    arXiv:1503.02531); 0 is sft, 1 does not look at the tokens themselves."""
    divergence: Divergence = Divergence.forward_kl
    """Divergence of teacher q and student p. forward_kl: KL(q || p), which covers all that the teacher does;
    reverse_kl: KL(p || q), which keeps to what it does most (Gu et al. 2023, arXiv:2306.08543); jsd: between them
    (Agarwal et al. 2024, arXiv:2306.13649)."""
    jsd_beta: float = 0.5
    """b in b KL(q || m) + (1 - b) KL(p || m), m = b q + (1 - b) p, of divergence=jsd."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.weight <= 1:
            raise ValueError(f"objective.weight={self.weight}: must be at least 0 and at most 1")
        if not 0 < self.jsd_beta < 1:
            raise ValueError(
                f"objective.jsd_beta={self.jsd_beta}: must be above 0 and below 1; the ends are "
                "objective.divergence=forward_kl and reverse_kl"
            )

    @property
    def mix(self) -> Mix:
        """Return the options in the terms of the kernel."""
        beta = {Divergence.forward_kl: 0.0, Divergence.reverse_kl: 1.0, Divergence.jsd: self.jsd_beta}[self.divergence]
        return Mix(self.weight, self.temperature, beta)


class DistilledLoss(TaughtLoss):
    """(1 - w) * cross entropy + w T^2 D(teacher, student), each summed over supervised tokens."""

    config: DistillConfig

    def forward(self, batch: Batch) -> Tensor:
        """Return the loss summed over the batch's supervised tokens, each times its weight, fp32 scalar."""
        if not self.is_checked:
            self.check(batch)
        # The teacher runs before the step's own forward, whose activations are not there yet.
        taught = self.given_teacher.readout(batch) if self.config.runs_teacher else None
        readout = self.readout(batch)
        if taught is None:
            if batch.top is None:
                raise RuntimeError(
                    "objective.teacher_top_k: nothing is kept of the teacher; call keep_teacher before fit"
                )
            losses = kept_token_losses(readout, batch.top, self.config.mix)
        else:
            losses = taught_token_losses(readout, taught, self.config.mix)
        weights = readout.weights
        count = losses.mixed.new_tensor(batch.loss_weight)
        self.measured = {
            "cross_entropy": (weighted_sum(losses.cross_entropy, weights), count),
            "divergence": (weighted_sum(losses.divergence, weights), count),
        }
        return weighted_sum(losses.mixed, weights)


OBJECTIVE = Objective(
    DistillConfig,
    DistilledLoss,
    logs=MEASURED,
    formula="(1 - w) (-log p(answer)) + w T^2 D(teacher, p at T), per token",
    paper="arXiv:1503.02531",
    reads_teacher_prompt=True,
    check=check_run,
)
