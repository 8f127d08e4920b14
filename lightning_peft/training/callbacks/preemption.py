"""Leave a run at a step boundary once any rank was signalled."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_peft import distributed
from lightning_peft.compat import is_accumulating, leave_signals_alone, validation_follows
from lightning_peft.training.callbacks.adapter_checkpoint import AdapterCheckpoint
from lightning_peft.training.preemption import REASONS, Paused, Preempted, PreemptionSignals
from lightning_peft.training.signal_watch import SIGNAL_WATCH

logger = logging.getLogger(__name__)


class Preemption(Callback):
    """Ranks agree after each optimiser step, and after a validation that follows it; then save and raise the reason.

    Nothing of what ends a fit runs then: no validation, and no export but for a paused run's adapter. A run whose
    checkpoint is at `pause_at` already, as it was told to leave or was killed there, pauses without another step.
    """

    def __init__(
        self,
        signals: PreemptionSignals,
        checkpoint: AdapterCheckpoint,
        pause_at: int | None = None,
        validated: Callable[[Trainer], dict[str, Any]] = lambda trainer: {},
        how_to_go_on: Callable[[Path], str] = lambda run_dir: f"run_dir={run_dir} resume=auto goes on from there",
    ):
        """Take `validated`, which returns what a validation behind the last step has given, empty without one, and
        `how_to_go_on`, which returns what the user is told of a run's folder.
        """
        self.signals = signals
        self.checkpoint = checkpoint
        self.pause_at = pause_at
        self.validated = validated
        self.how_to_go_on = how_to_go_on
        self.trainer: Trainer | None = None
        self.resumed: dict[str, Any] = {}
        """Values that `validated` returned behind the step of the checkpoint that this start goes on from."""
        self.resumed_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.trainer = trainer
        leave_signals_alone(trainer)  # `training/preemption.py` owns them

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.resumed_step = trainer.global_step
        self.signals.start()
        SIGNAL_WATCH.begins_to_train()
        if self.is_at_pause(trainer):
            self.leave_if_asked(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        SIGNAL_WATCH.progress()
        if not is_accumulating(trainer) and not validation_follows(trainer):
            self.leave_if_asked(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        SIGNAL_WATCH.progress()
        if trainer.state.fn == "fit" and not is_accumulating(trainer):
            self.leave_if_asked(trainer, pl_module)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        SIGNAL_WATCH.progress()
        # The validation after the last step is not worth waiting for: the run resumes from its last checkpoint.
        if trainer.state.fn == "validate" and (reason := self.reason_of_all()) not in (None, Paused):
            assert reason is not None
            raise reason

    def leave_if_asked(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reason = self.reason_of_all()
        is_there = self.is_at_pause(trainer)
        reason = Paused if reason is None and is_there else reason
        if reason is None or (reason is Paused and trainer.global_step >= trainer.max_steps):
            return
        SIGNAL_WATCH.leaves_by_itself()
        self.checkpoint.save(trainer)
        trainer.strategy.checkpoint_io.teardown()  # files written in the background are on disk before we say so
        if reason is Paused:
            self.checkpoint.save_adapter(pl_module, self.checkpoint.run_dir / "adapter")
        for run_logger in trainer.loggers:
            run_logger.save()
        if trainer.is_global_zero:
            pause = "pause_at" if is_there else "trainer.max_time"
            name = self.signals.received.name if self.signals.received else "a signal to another rank"
            cause, again = pause if reason is Paused else name, self.how_to_go_on(self.checkpoint.run_dir)
            later = ", with a later pause_at or null" if reason is Paused and is_there else ""
            logger.info("%s: saved after step %d; %s%s", cause, trainer.global_step, again, later)
        raise reason

    def is_at_pause(self, trainer: Trainer) -> bool:
        return self.pause_at is not None and trainer.global_step >= self.pause_at

    def last_validation(self) -> dict[str, Any]:
        """Return what the validation behind the last step gave, which an earlier start may have taken."""
        assert self.trainer is not None, "setup keeps it"
        found = self.validated(self.trainer)
        return found or (self.resumed if self.trainer.global_step == self.resumed_step else {})

    def state_dict(self) -> dict[str, Any]:
        return {"validation": self.last_validation()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.resumed = state_dict["validation"]

    def reason_of_all(self) -> type[Preempted] | None:
        """Return the weightiest reason that any rank has to leave."""
        own = self.signals.reason
        number = distributed.highest(0 if own is None else REASONS.index(own) + 1)
        return REASONS[number - 1] if number else None
