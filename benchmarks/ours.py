"""`lightning-peft train`, taking its steps in turn with other processes."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks.memory import PeakMemory, synchronize
from benchmarks.turns import Turns


class TakeTurns(Callback):
    """Asks for its turn before each batch; `train` creates it before the model is loaded."""

    def __init__(self) -> None:
        self.turns = Turns(synchronize)
        self.memory = PeakMemory()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.turns.begin()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.turns.loss = float(pl_module.step_metrics["loss"])  # type: ignore[arg-type, index]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.turns.end(peak=self.memory.stop())


def train_command(overrides: Sequence[str], steps: int, run_dir: Path) -> list[str]:
    """The command that trains in turns; validation and samples are off."""
    return [
        sys.executable, "-m", "lightning_peft", "train", *overrides, f"trainer.max_steps={steps}", "logger=none",
        f"run_dir={run_dir}", "+callbacks.turns._target_=benchmarks.ours.TakeTurns",
    ]  # fmt: skip
