"""Leaves a run at a step boundary once any rank was signalled."""

import logging
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from lightning_peft import distributed
from lightning_peft.training.callbacks.adapter_checkpoint import AdapterCheckpoint, between_steps, validation_follows
from lightning_peft.training.preemption import Preempted, PreemptionSignals
from lightning_peft.training.signal_watch import SIGNAL_WATCH

logger = logging.getLogger(__name__)


class NoSignalHandlers(_SignalConnector):
    """In place of Lightning's own: they save and broadcast inside the handler, wherever the step happens to be."""

    def register_signal_handlers(self) -> None:
        """Nothing: `training/preemption.py` owns the signals."""


class Preemption(Callback):
    """Ranks agree after each optimiser step, and after a validation that follows it; then save and raise Preempted.

    Nothing of what ends a fit runs then: no validation, no export.
    """

    def __init__(self, signals: PreemptionSignals, checkpoint: AdapterCheckpoint):
        self.signals = signals
        self.checkpoint = checkpoint

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        trainer._signal_connector = NoSignalHandlers(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.signals.start()
        SIGNAL_WATCH.begins_to_train()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        SIGNAL_WATCH.progress()
        if between_steps(trainer) and not validation_follows(trainer):
            self.leave_if_signalled(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        SIGNAL_WATCH.progress()
        if trainer.state.fn == "fit" and between_steps(trainer):
            self.leave_if_signalled(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        SIGNAL_WATCH.progress()
        # The validation after the last step is not worth waiting for: the run resumes from its last checkpoint.
        if trainer.state.fn == "validate" and self.any_rank_signalled():
            raise Preempted

    def leave_if_signalled(self, trainer: Trainer) -> None:
        if not self.any_rank_signalled():
            return
        SIGNAL_WATCH.leaves_by_itself()
        self.checkpoint.save(trainer)
        trainer.strategy.checkpoint_io.teardown()  # what is written in the background is on disk before we say so
        for run_logger in trainer.loggers:
            run_logger.save()
        if trainer.is_global_zero:
            name = self.signals.received.name if self.signals.received else "a signal to another rank"
            logger.info("%s: saved after step %d; resume=auto goes on from there", name, trainer.global_step)
        raise Preempted

    def any_rank_signalled(self) -> bool:
        return distributed.any_rank(self.signals.received is not None)
