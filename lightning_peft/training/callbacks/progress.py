"""Progress as plain lines, for logs and pipes where a bar would be noise."""

import logging
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


class PlainProgress(ProgressBar):
    """Logs step, loss, tokens/s and the time left at most every ten seconds, on rank zero."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True
        self.printed = self.started = time.perf_counter()
        self.first_step = 0

    def disable(self) -> None:
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = time.perf_counter()
        self.first_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        step, total = trainer.global_step, int(trainer.estimated_stepping_batches)
        stepped = not trainer.fit_loop._should_accumulate()
        first = step == self.first_step + 1
        if (
            not self.enabled
            or not stepped
            or not (first or step == total or now - self.printed > SECONDS_BETWEEN_LINES)
        ):
            return
        self.printed = now
        done = step - self.first_step
        left = (total - step) * (now - self.started) / max(done, 1)
        metrics = pl_module.step_metrics
        logger.info("step %d/%d  loss %.4f  %.0f s left", step, total, float(metrics["loss"]), left)  # type: ignore[index, arg-type, operator]
