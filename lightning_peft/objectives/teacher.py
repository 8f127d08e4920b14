"""The teacher of an objective: a frozen model beside the one that trains, its options, and a loss that asks it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lightning_peft.adapters.registry import METHODS
from lightning_peft.data.batch import Batch
from lightning_peft.objectives.linear_cross_entropy import Readout
from lightning_peft.objectives.model_loss import ModelLoss
from lightning_peft.objectives.objective import ObjectiveConfig
from lightning_peft.objectives.sft import SupervisedLoss

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # a start that trains nothing does without it


@dataclass
class TaughtConfig(ObjectiveConfig):
    """Options of every objective that has a teacher."""

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
    temperature: float = 1.0
    """Number that both models' logits are divided by in the divergence; above 1 small probabilities count for more."""

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"objective.temperature={self.temperature}: must be above 0")
        if self.teacher_top_k is not None and self.teacher_top_k < 1:
            raise ValueError(f"objective.teacher_top_k={self.teacher_top_k}: must be at least 1, or null")
        if self.quantize_teacher and self.teacher is None:
            raise ValueError(
                "objective.quantize_teacher=true: the teacher is the base, quantised as that is; give objective.teacher"
            )

    @property
    def runs_teacher(self) -> bool:
        """Return whether the teacher runs in each step; else what it gives is kept before the first."""
        return self.teacher_top_k is None


def check_run(run: Any, objective: TaughtConfig) -> None:
    """Raise ValueError where a run cannot have a teacher beside it, or cannot keep what one gave."""
    if not objective.runs_teacher:
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

    def check(self, batch: Batch) -> None:
        """See how the model makes its logits, and whether it keeps packed samples apart."""
        self.loss.check(batch)

    @torch.no_grad()
    def readout(self, batch: Batch) -> Readout:
        """Return the teacher's hidden states and head, without a gradient."""
        return self.loss.readout(batch.taught or batch)


class TaughtLoss(ModelLoss):
    """A loss with a teacher, which whoever has loaded the model gives it before the first batch."""

    teacher: Teacher | None = None

    def __init__(self, model: "PreTrainedModel", config: TaughtConfig, packing: bool | str):
        super().__init__(model, packing)
        self.config = config

    def check(self, batch: Batch) -> None:
        """See how both models make logits, and whether each keeps packed samples apart."""
        super().check(batch)
        if self.config.runs_teacher:
            self.given_teacher.check(batch)

    @property
    def given_teacher(self) -> Teacher:
        assert self.teacher is not None, "a teacher is given before the first batch"
        return self.teacher
