"""Resumable checkpoints every few steps, and the best adapter of the validations in a folder of its own."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_peft.checkpoint.atomic import atomic_file, check_is_there
from lightning_peft.checkpoint.resume import checkpoint_path
from lightning_peft.compat import is_accumulating, validation_follows
from lightning_peft.strict_json import json_text, read_object
from lightning_peft.training.callbacks.early_stopping import validated
from lightning_peft.training.config import CheckpointConfig

logger = logging.getLogger(__name__)


class AdapterCheckpoint(Callback):
    """Writes `checkpoints/step-XXXXXXXX.ckpt` between optimiser steps, and `adapter_best/` after a better validation.

    Where a validation follows the step, the checkpoint is written after it: a resumed run starts behind both. The files
    hold adapters, optimiser, schedule and loader state only. `save_adapter` writes an adapter folder. A checkpoint that
    is due waits until `is_calm` is true: one behind a loss that explodes would push out those to go back to.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        run_dir: Path,
        save_adapter: Callable[[LightningModule, Path], None],
        is_calm: Callable[[Trainer, LightningModule], bool] = lambda trainer, module: True,
    ):
        self.config = config
        self.run_dir = run_dir
        self.save_adapter = save_adapter
        self.is_calm = is_calm
        self.is_due = False
        self.best = math.inf
        """Best value of `config.best_by`, negative where large is good."""
        self.saved_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.saved_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not is_accumulating(trainer) and not validation_follows(trainer):
            self.save_if_due(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self.keep_best(trainer, pl_module)
        if not is_accumulating(trainer):
            self.save_if_due(trainer, pl_module)

    def save_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.config.every_n_steps is None:
            return
        self.is_due = self.is_due or trainer.global_step % self.config.every_n_steps == 0
        if self.is_due and self.is_calm(trainer, pl_module):
            self.is_due = False
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Write the checkpoint of this step, once. All ranks call it together."""
        if trainer.global_step == self.saved_step:
            return
        if trainer.is_global_zero:
            check_is_there(self.run_dir)
        self.saved_step = trainer.global_step
        trainer.save_checkpoint(checkpoint_path(self.run_dir / "checkpoints", self.saved_step))

    def keep_best(self, trainer: Trainer, pl_module: LightningModule) -> None:
        value = validated(trainer, self.config.best_by)
        if value is None or value >= self.best:
            return
        self.best = value
        self.save_adapter(pl_module, self.run_dir / "adapter_best")
        if not trainer.is_global_zero:
            return
        with atomic_file(self.best_path) as path:
            path.write_text(json_text({self.metric: self.sign * value, "step": trainer.global_step}))

    @property
    def metric(self) -> str:
        return self.config.best_by.removeprefix("-")

    @property
    def sign(self) -> int:
        return -1 if self.config.best_by.startswith("-") else 1

    @property
    def best_path(self) -> Path:
        return self.run_dir / "checkpoints" / "best.json"

    def best_written(self) -> Any:
        """Return the best value that a file remembers; None without one, and where it is damaged."""
        if not self.best_path.exists():
            return None
        try:
            return read_object(self.best_path, "the best value is the checkpoint's").get(self.metric)
        except ValueError as error:
            logger.warning("%s", error)
            return None

    def state_dict(self) -> dict[str, Any]:
        return {"best_by": self.config.best_by, "best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # A validation at the checkpoint's own step came after it; its result stands in the file only.
        written = self.best_written()
        known = [] if written is None else [self.sign * float(written)]
        if state_dict.get("best_by") == self.config.best_by:  # the best by another metric is forgotten
            known.append(state_dict["best"])
        self.best = min(known, default=math.inf)
