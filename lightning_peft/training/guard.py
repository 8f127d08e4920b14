"""Notices a run that diverges: a loss or gradient that is not finite, or a loss far above what it was."""

import logging
import math
import statistics
from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import nn

from lightning_peft.training.preemption import Preempted

logger = logging.getLogger(__name__)

REMEMBERED = 100
"""Losses whose median is what a loss is compared with."""
ENOUGH = 20
"""Losses after which there is a median to compare with."""


class GuardAction(Enum):
    stop = "stop"
    """End the run as diverged; checkpoints and the best adapter of before stay."""
    none = "none"
    """Go on."""


@dataclass
class GuardConfig:
    """When a run counts as diverged, and what follows."""

    action: GuardAction = GuardAction.stop
    """stop ends the run as diverged, with exit status 3; none goes on whatever the loss is."""
    factor: float | None = 10.0
    """Times the median of the last hundred losses that a loss may be; null looks at finiteness alone."""
    patience: int = 20
    """Steps in a row above that before the run counts as diverged."""

    def __post_init__(self) -> None:
        if self.factor is not None and self.factor <= 1:
            raise ValueError(f"guard.factor={self.factor}: must be above 1, or null")
        if self.patience < 1:
            raise ValueError(f"guard.patience={self.patience}: must be at least 1")


class Diverged(Preempted):
    """Raised on every rank: the run is over, and no checkpoint or adapter of this step is written."""

    status = "diverged"
    exit_status = 3


class Guard:
    """Looks at the numbers of a step when they are read for the loggers anyway, so that no device is waited for."""

    def __init__(self, config: GuardConfig, has_scaled_gradients: bool = False) -> None:
        """With `has_scaled_gradients` (16-mixed) a gradient may overflow: its step is left out by the scaler."""
        self.config = config
        self.has_scaled_gradients = has_scaled_gradients
        self.losses: deque[float] = deque(maxlen=REMEMBERED)
        self.above = 0

    def look(self, step: int, values: dict[str, Any], model: nn.Module) -> None:
        """Raise Diverged where the step's loss or gradient says so. All ranks see the same numbers."""
        if self.config.action is GuardAction.none:
            return
        loss, norm = values["loss"], values.get("grad_norm", 0.0)
        if not math.isfinite(loss) or not (math.isfinite(norm) or self.has_scaled_gradients):
            raise self.diverged(f"step {step}: loss {loss:g}, norm of the gradient {norm:g}{not_finite(model)}")
        median = statistics.median(self.losses) if len(self.losses) >= ENOUGH else math.inf
        is_above = self.config.factor is not None and loss > self.config.factor * median
        self.above = self.above + 1 if is_above else 0
        if self.above >= self.config.patience:
            raise self.diverged(
                f"step {step}: loss {loss:.4g}, for {self.above} steps above guard.factor={self.config.factor:g} times "
                f"the median {median:.4g} of those before"
            )
        if not is_above:
            self.losses.append(loss)

    def diverged(self, reason: str) -> Diverged:
        logger.error(
            "diverged at %s; checkpoints of before stay. A lower optimizer.lr or a longer schedule.warmup_steps helps; "
            "guard.action=none goes on",
            reason,
        )
        return Diverged()


def not_finite(model: nn.Module) -> str:
    """The first trained parameter that is not finite, or has a gradient that is not, in words."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        for what, tensor in (("", parameter), ("the gradient of ", parameter.grad)):
            if tensor is not None and not bool(torch.isfinite(tensor.detach()).all()):
                return f"; {what}{name} is not finite"
    return ""
