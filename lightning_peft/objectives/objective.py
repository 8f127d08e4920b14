"""Everything an objective says about itself: one row, written in its own file; `registry.OBJECTIVES` collects them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_peft.data.config import RowKind
from lightning_peft.objectives.model_loss import ModelLoss

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # a start that trains nothing does without it


@dataclass
class ObjectiveConfig:
    """Options of every objective; each has its own below this."""

    name: str = "sft"
    """A key of `OBJECTIVES`; set by the option file."""


@dataclass(frozen=True)
class Objective:
    """Everything that the rest of the program knows about an objective."""

    config: type[ObjectiveConfig]
    build: "Callable[[PreTrainedModel, Any, bool | str], ModelLoss]"
    """(model, options, `data.packing`) -> the model with its loss."""
    rows: RowKind = RowKind.answers
    """Columns that a row must hold."""
    uses_reference: bool = False
    """True where the loss compares with the model as it was before training."""
    logs: tuple[str, ...] = ()
    """Names of what `ModelLoss.measured` holds after each forward."""
    formula: str = ""
    """The loss, as the table of objectives prints it."""
    paper: str = ""
    """The publication of the objective."""
    prepare: "Callable[[PreTrainedModel, int], Any] | None" = None
    """(model, seed): adds what trains beside adapters, such as a head; called before they are put in."""
    gives_rewards: bool = False
    """True where what is trained scores answers, and writes none."""
    reads_teacher_prompt: bool = False
    """True where `data.teacher_prompt` is read."""
    check: "Callable[[Any, Any], None] | None" = None
    """(the run's `TrainConfig`, options): raises ValueError for a run that the objective cannot have."""
