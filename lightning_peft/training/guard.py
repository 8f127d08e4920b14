"""Notice a run that diverges: a loss or gradient that is not finite, or a loss far above what it was."""

import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_peft import distributed
from lightning_peft.optim.sharded import local
from lightning_peft.training.config import GuardAction, GuardConfig
from lightning_peft.training.health import NOTHING, ChangeSize, is_no_op
from lightning_peft.training.preemption import Preempted

logger = logging.getLogger(__name__)

REMEMBERED = 100
"""Losses whose median is what a loss is compared with."""
ENOUGH = 20
"""Losses after which there is a median to compare with."""
NAMED_ROWS = 4
"""Rows of a batch that a line names; the result has them all."""


class Diverged(Preempted):
    """Raised on every rank: the run is over, and no checkpoint or adapter of this step is written."""

    status = "diverged"
    exit_status = 3

    def __init__(self, step: int, reason: str, rows: Sequence[str] = ()) -> None:
        super().__init__()
        self.step = step
        self.reason = reason
        """Finding of the step, in words."""
        self.rows = list(rows)
        """The places of the rows of its batches, of all ranks."""
        self.can_be_undone = True
        """True where another rate may help."""


class Guard:
    """Looks at the numbers of a step when they are read for the loggers anyway, so that no device is waited for."""

    def __init__(self, config: GuardConfig, has_scaled_gradients: bool = False) -> None:
        """Let gradients overflow with `has_scaled_gradients` (16-mixed): their step is left out by the scaler."""
        self.config = config
        self.has_scaled_gradients = has_scaled_gradients
        self.losses: deque[float] = deque(maxlen=REMEMBERED)
        self.above = 0
        """Steps in a row, the last one included, whose loss was above the bound."""
        self.left_out = 0
        """Steps of the run that were left out."""
        self.left_out_in_a_row = 0
        self.is_learning = config.no_op_steps is None
        """True where the adapter is known to change a layer, or nobody asks."""

    @property
    def is_calm(self) -> bool:
        """Return whether the last step looked at was a good one: a checkpoint written now is one to go back to."""
        return self.above == 0 and self.left_out_in_a_row == 0

    def look(
        self, step: int, values: dict[str, Any], model: nn.Module, rows_of: Callable[[], Sequence[str]] = tuple
    ) -> None:
        """Raise Diverged where the step's loss or gradient says so. All ranks see the same numbers.

        rows_of: asks all ranks where the rows of the step stand.
        """
        if self.config.action is GuardAction.none:
            return
        loss, norm = values["loss"], values.get("grad_norm", 0.0)
        if not math.isfinite(loss) or not (math.isfinite(norm) or self.has_scaled_gradients):
            rows = rows_of()
            seen = f"loss {loss:g}, norm of the gradient {norm:g}{not_finite(model)}{named(rows)}"
            if self.config.action is not GuardAction.skip:
                raise Diverged(step, seen, rows)
            self.note_left_out(step, seen, model, rows)
            return
        self.left_out_in_a_row = 0
        median = statistics.median(self.losses) if len(self.losses) >= ENOUGH else math.inf
        is_above = self.config.factor is not None and loss > self.config.factor * median
        self.above = self.above + 1 if is_above else 0
        if self.above >= self.config.patience:
            rows = rows_of()
            raise Diverged(
                step,
                f"loss {loss:.4g}, for {self.above} steps above guard.factor={self.config.factor:g} times the median "
                f"{median:.4g} of those before{named(rows)}",
                rows,
            )
        if not is_above:
            self.losses.append(loss)

    def note_left_out(self, step: int, seen: str, model: nn.Module, rows: Sequence[str]) -> None:
        """Count a step that moved nothing. Raises Diverged where there are too many, or where a weight is broken."""
        self.left_out += 1
        self.left_out_in_a_row += 1
        if has_broken_weight(model):
            raise Diverged(step, f"{seen}; leaving steps out mends no weight", rows)
        if self.left_out_in_a_row >= self.config.patience:
            last = f"{seen}; the last of guard.patience={self.config.patience} steps left out in a row"
            raise Diverged(step, last, rows)
        logger.warning(
            "step %d is left out: %s; %d of the run so far, %d in a row", step, seen, self.left_out,
            self.left_out_in_a_row,
        )  # fmt: skip

    def is_no_op_due(self, step: int) -> bool:
        """Return whether it is time to look if the adapter changes anything."""
        due = self.config.no_op_steps
        return self.config.action is not GuardAction.none and not self.is_learning and due is not None and step >= due

    def look_at_changes(self, step: int, changes: Mapping[str, ChangeSize]) -> None:
        """Raise Diverged where no layer differs from its base."""
        if is_no_op(changes.values()):
            found = Diverged(
                step,
                f"the adapter still changes nothing: after guard.no_op_steps={self.config.no_op_steps} steps none of "
                f"{len(changes)} layers differs from its base by more than {NOTHING:g} of it",
            )
            found.can_be_undone = False
            raise found
        self.is_learning = True

    def state_dict(self) -> dict[str, Any]:
        return {
            "losses": list(self.losses),
            "above": self.above,
            "left_out": self.left_out,
            "left_out_in_a_row": self.left_out_in_a_row,
            "is_learning": self.is_learning,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state; one of a program that kept none begins anew."""
        self.losses.extend(state.get("losses", []))
        self.above, self.left_out = state.get("above", 0), state.get("left_out", 0)
        self.left_out_in_a_row = state.get("left_out_in_a_row", 0)
        self.is_learning = self.is_learning or state.get("is_learning", False)


def has_broken_weight(model: nn.Module) -> bool:
    """Return on every rank whether any has a trained number that is not finite."""
    parameters = [local(parameter.detach()) for parameter in model.parameters() if parameter.requires_grad]
    return bool(distributed.highest(int(any(not bool(torch.isfinite(part).all()) for part in parameters))))


def not_finite(model: nn.Module) -> str:
    """Return the first trained parameter that is not finite, or has a gradient that is not, in words."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        for what, tensor in (("", parameter), ("the gradient of ", parameter.grad)):
            if tensor is not None and not bool(torch.isfinite(local(tensor.detach())).all()):
                return f"; {what}{name} is not finite"
    return ""


def named(rows: Sequence[str]) -> str:
    """Return text as in "; its rows: a.jsonl line 3, a.jsonl line 8 and 6 more"; empty where nobody says."""
    if not rows:
        return ""
    more = f" and {len(rows) - NAMED_ROWS} more" if len(rows) > NAMED_ROWS else ""
    return f"; its rows: {', '.join(rows[:NAMED_ROWS])}{more}"
