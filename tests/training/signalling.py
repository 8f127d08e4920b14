"""Callbacks that disturb a run at a chosen moment, so that a test need not guess the time."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_peft.distributed import highest
from lightning_peft.training.callbacks.preemption import Preemption


class SignalAt(Callback):
    """Sends `name` before the micro batch, counted over the run, with index `micro_batch`, once its gradients exist."""

    def __init__(self, name: str, micro_batch: int):
        self.number = signal.Signals[name]
        self.micro_batch = micro_batch

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fit_loop.total_batch_idx == self.micro_batch:
            os.kill(os.getpid(), self.number)


class SignalInValidation(Callback):
    """Sends SIGTERM in the first validation of one kind: fit for those during training, validate for the last one."""

    def __init__(self, stage: str):
        self.stage = stage

    def on_validation_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.state.fn == self.stage:
            os.kill(os.getpid(), signal.SIGTERM)


class FailAt(Callback):
    """Raises at a micro batch."""

    def __init__(self, micro_batch: int):
        self.micro_batch = micro_batch

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fit_loop.total_batch_idx == self.micro_batch:
            raise RuntimeError(f"micro batch {self.micro_batch}")


class MoveAt(Callback):
    """Moves the run's folder at a micro batch, as a person might."""

    def __init__(self, micro_batch: int, to: str):
        self.micro_batch = micro_batch
        self.to = to

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fit_loop.total_batch_idx == self.micro_batch:
            Path(trainer.default_root_dir).parent.rename(self.to)


class SleepAt(Callback):
    """Stays in a micro batch for a minute, and says so by a file `asleep` in the run folder."""

    def __init__(self, micro_batch: int):
        self.micro_batch = micro_batch

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fit_loop.total_batch_idx == self.micro_batch:
            Path(trainer.default_root_dir).with_name("asleep").touch()
            time.sleep(60)


class SlowStart(Callback):
    """Takes a while to make, as a large model does to load."""

    def __init__(self, seconds: float):
        time.sleep(seconds)


class PauseFirstStart(Callback):
    """Waits before the step after `step` until a signal comes, in a SLURM job that was not requeued yet."""

    def __init__(self, step: int, seconds: float):
        self.step = step
        self.seconds = seconds

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step != self.step or "SLURM_RESTART_COUNT" in os.environ:
            return
        signals = next(c.signals for c in trainer.callbacks if isinstance(c, Preemption))
        deadline = time.monotonic() + self.seconds
        while signals.received is None and time.monotonic() < deadline:
            time.sleep(0.05)


class PauseBeforeSteps(Callback):
    """Makes every step take so much longer."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        time.sleep(self.seconds)


class ExplodeAt(Callback):
    """Makes the gradients of a step infinite; with `once` only the first time that the run gets there."""

    def __init__(self, step: int, once: bool = False):
        self.step = step
        self.once = once

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step + 1 == self.step and not (self.once and self.was_there(trainer)):
            for parameter in pl_module.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(float("inf"))

    def was_there(self, trainer: Trainer) -> bool:
        marker = Path(trainer.default_root_dir).with_name(f"exploded-{trainer.global_rank}")
        found = marker.exists()
        marker.touch()
        return found


class DropGradientsAt(Callback):
    """Leaves the optimiser nothing to step by."""

    def __init__(self, step: int):
        self.step = step

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step + 1 == self.step:
            for parameter in pl_module.parameters():
                parameter.grad = None


class ExplodeOnLong(Callback):
    """Makes the gradients infinite of the step in which a sample has more than so many tokens."""

    def __init__(self, tokens: int):
        self.tokens = tokens
        self.is_there = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.is_there = self.is_there or int(batch.lengths.max()) > self.tokens

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if highest(int(self.is_there)):  # the gradients have been added up over the ranks
            for parameter in pl_module.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(float("inf"))
