"""Callbacks that end a run in the ways a cluster does, named by `callbacks.NAME._target_`."""

import os
import signal
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class KillRankOne(Callback):
    """As the kernel does with a process that takes too much memory."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == 1 and batch_idx == 1:
            os.kill(os.getpid(), signal.SIGKILL)


class SignalLauncher(Callback):
    """As SLURM or a shell do: the launcher alone gets the signal."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == 0 and batch_idx == 1:
            os.kill(os.getppid(), signal.SIGTERM)
