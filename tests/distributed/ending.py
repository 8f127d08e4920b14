"""Callbacks that end a run in the ways a cluster does, named by `callbacks.NAME._target_`."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class KillRankOne(Callback):
    """A kill as the kernel's of a process that takes too much memory."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == 1 and batch_idx == 1:
            os.kill(os.getpid(), signal.SIGKILL)


class RankOneEnds(Callback):
    """Raises, leaves with a status, or sleeps for ever."""

    def __init__(self, how: str):
        self.how = how

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank != 1 or batch_idx != 1:
            return
        if self.how == "raise":
            raise RuntimeError("the callback broke")
        if self.how.isdigit():
            os._exit(int(self.how))
        Path(trainer.default_root_dir).with_name("asleep").touch()
        time.sleep(600)


class SignalLauncher(Callback):
    """A signal as SLURM's or a shell's: the launcher alone gets it."""

    def __init__(self, name: str = "SIGTERM"):
        self.number = signal.Signals[name]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == 0 and batch_idx == 1:
            os.kill(os.getppid(), self.number)
