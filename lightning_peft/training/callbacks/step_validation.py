"""Validation every so many optimiser steps. Lightning itself counts micro batches, and may validate inside a window."""

import sys
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_peft.compat import is_accumulating

NEVER = sys.maxsize
"""A `val_check_interval` no run reaches; with infinity Lightning would validate at the end of each epoch."""


class StepValidation(Callback):
    """Validates after optimiser steps n, 2n, 3n ..., and after further ones.

    Needs `val_check_interval=NEVER, check_val_every_n_epoch=None`.
    """

    def __init__(self, every_n_steps: int | None, at_steps: Sequence[int] = ()):
        self.every_n_steps = every_n_steps
        self.at_steps = frozenset(at_steps)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Lightning asks right after this hook whether the number of batches is a multiple of val_check_batch.
        stepped, step = not is_accumulating(trainer), trainer.global_step
        is_due = step in self.at_steps or (self.every_n_steps is not None and step % self.every_n_steps == 0)
        trainer.val_check_batch = 1 if stepped and is_due else NEVER
