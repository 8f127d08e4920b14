"""Distillation: the answers' tokens, and at each of them a teacher's whole distribution (Hinton et al. 2015)."""

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_peft.adapters.registry import METHODS
from lightning_peft.data.batch import Batch
from lightning_peft.kernels.cross_entropy import weighted_sum
from lightning_peft.kernels.divergence import Mix
from lightning_peft.objectives.linear_cross_entropy import Readout
from lightning_peft.objectives.linear_divergence import kept_token_losses, taught_token_losses
from lightning_peft.objectives.model_loss import ModelLoss
from lightning_peft.objectives.objective import Objective, ObjectiveConfig
from lightning_peft.objectives.sft import SupervisedLoss

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # a start that trains nothing does without it

MEASURED = ("cross_entropy", "divergence")
"""Means over supervised tokens that are logged, neither with its factor in the loss."""


class Divergence(Enum):
    """The distance of the student's distribution p from the teacher's q."""

    forward_kl = "forward_kl"
    reverse_kl = "reverse_kl"
    jsd = "jsd"


@dataclass
class DistillConfig(ObjectiveConfig):
    name: str = "distill"
    teacher: str | None = None
    """Model that teaches, with the vocabulary of the one that learns: a preset of `model=`, a folder, a hub id or a
    .gguf file; null is the base itself, of whose weights there is no second copy."""
    teacher_adapter: str | None = None
    """Run or adapter folder that the teacher has; without `teacher` it stands on the same base."""
    quantize_teacher: bool = False
    """Quantise weights read for `teacher` as the base is; false reads them as they are stored."""
    teacher_top_k: int | None = None
    """Likeliest tokens of the teacher that are kept, with the mass of all others as one: the teacher reads all rows
    once, before training, and what it gives stands beside their tokens in data.cache_dir; null runs it in each step."""
    weight: float = 0.5
    """w in (1 - w) * cross entropy + w * temperature^2 * divergence, over supervised tokens (Hinton et al. 2015,
    arXiv:1503.02531); 0 is sft, 1 does not look at the tokens themselves."""
    temperature: float = 1.0
    """Number that both models' logits are divided by in the divergence; above 1 small probabilities count for more."""
    divergence: Divergence = Divergence.forward_kl
    """Divergence of teacher q and student p. forward_kl: KL(q || p), which covers all that the teacher does;
    reverse_kl: KL(p || q), which keeps to what it does most (Gu et al. 2023, arXiv:2306.08543); jsd: between them
    (Agarwal et al. 2024, arXiv:2306.13649)."""
    jsd_beta: float = 0.5
    """b in b KL(q || m) + (1 - b) KL(p || m), m = b q + (1 - b) p, of divergence=jsd."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ValueError(f"objective.weight={self.weight}: must be at least 0 and at most 1")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"objective.temperature={self.temperature}: must be above 0")
        if not 0 < self.jsd_beta < 1:
            raise ValueError(
                f"objective.jsd_beta={self.jsd_beta}: must be above 0 and below 1; the ends are "
                "objective.divergence=forward_kl and reverse_kl"
            )
        if self.teacher_top_k is not None and self.teacher_top_k < 1:
            raise ValueError(f"objective.teacher_top_k={self.teacher_top_k}: must be at least 1, or null")
        if self.quantize_teacher and self.teacher is None:
            raise ValueError(
                "objective.quantize_teacher=true: the teacher is the base, quantised as that is; give objective.teacher"
            )

    @property
    def mix(self) -> Mix:
        """Return the options in the terms of the kernel."""
        beta = {Divergence.forward_kl: 0.0, Divergence.reverse_kl: 1.0, Divergence.jsd: self.jsd_beta}[self.divergence]
        return Mix(self.weight, self.temperature, beta)


def check_run(run: Any, objective: DistillConfig) -> None:
    """Raise ValueError where a run cannot have a teacher beside it, or cannot keep what one gave."""
    if objective.teacher_top_k is not None:
        kept = f"objective.teacher_top_k={objective.teacher_top_k}"
        if run.data.cache_dir is None:
            raise ValueError(f"{kept} data.cache_dir=null: names no folder to keep it in; leave data.cache_dir out")
        if run.data.streaming:
            raise ValueError(
                f"{kept} data.streaming=true: rows that are read during training are not there before it; leave "
                "one of them out"
            )
        return
    if run.strategy.kind.name == "fsdp":
        raise ValueError(
            f"objective={objective.name} strategy=fsdp: every rank holds the teacher whole, and slices of a base share "
            "nothing with it; use strategy=ddp, or quantization=nf4 where memory is short"
        )
    if run.adapter.method in METHODS and METHODS[run.adapter.method].select is not None:
        raise ValueError(
            f"objective={objective.name} method={run.adapter.method}: chooses its modules by gradients of the loss, "
            "before there is a teacher; use another method"
        )
    if objective.teacher is None and run.adapter.initialization.rewrites_base:
        raise ValueError(
            f"objective={objective.name} adapter.init={run.adapter.init_name}: the start takes a part out of the base "
            "that the teacher shares; use adapter.init=kaiming, or read it once more with "
            f"objective.teacher={run.model.path or run.model.name}"
        )


class Teacher:
    """A frozen model beside the one that trains: no module of it, so that it is neither trained, saved nor reduced."""

    def __init__(self, model: "PreTrainedModel", packing: bool | str = "auto"):
        model.requires_grad_(False)
        self.loss = SupervisedLoss(model, packing).eval()


class DistilledLoss(ModelLoss):
    """(1 - w) * cross entropy + w T^2 D(teacher, student), each summed over supervised tokens."""

    teacher: Teacher | None = None
    """The teacher, given by whoever has loaded the model, before the first batch."""

    def __init__(self, model: "PreTrainedModel", config: DistillConfig, packing: bool | str):
        super().__init__(model, packing)
        self.config = config

    def check(self, batch: Batch) -> None:
        """See how both models make logits, and whether each keeps packed samples apart."""
        super().check(batch)
        if self.config.teacher_top_k is None:
            assert self.teacher is not None, "a teacher is given before the first batch"
            self.teacher.loss.check(batch)

    def forward(self, batch: Batch) -> Tensor:
        """Return the loss summed over the batch's supervised tokens, each times its weight, fp32 scalar."""
        if not self.is_checked:
            self.check(batch)
        # The teacher runs before the step's own forward, whose activations are not there yet.
        taught = None if self.config.teacher_top_k is not None else self.teacher_readout(batch)
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

    @torch.no_grad()
    def teacher_readout(self, batch: Batch) -> Readout:
        """Return the teacher's hidden states and head, without a gradient."""
        assert self.teacher is not None, "a teacher is given before the first batch"
        return self.teacher.loss.readout(batch.taught or batch)


OBJECTIVE = Objective(
    DistillConfig,
    DistilledLoss,
    logs=MEASURED,
    formula="(1 - w) (-log p(answer)) + w T^2 D(teacher, p at T), per token",
    paper="arXiv:1503.02531",
    reads_teacher_prompt=True,
    check=check_run,
)
