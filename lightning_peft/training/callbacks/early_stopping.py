"""End a run that gets no better."""

import logging
import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_peft.training.config import EarlyStoppingConfig

logger = logging.getLogger(__name__)


def validated(trainer: Trainer, metric: str) -> float | None:
    """Return what the last validation gave for a metric so that small is good; None where it gave nothing finite.

    `metric` is a name, with a minus sign before it where large is good.
    """
    value = trainer.callback_metrics.get(metric.removeprefix("-"))
    if value is None or not math.isfinite(value):
        return None
    return -float(value) if metric.startswith("-") else float(value)


class EarlyStopping(Callback):
    """Stops the Trainer after `patience` validations in a row that are no better than the best by `min_delta`.

    A validation that has no number for the metric, as one beyond `validation.budget`, counts neither way.
    """

    def __init__(self, config: EarlyStoppingConfig):
        assert config.metric is not None
        self.metric: str = config.metric
        self.config = config
        self.best = math.inf
        self.waited = 0
        self.reason: str | None = None
        """Reason for which the run was stopped."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = trainer.should_stop or self.reason is not None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        value = validated(trainer, self.metric)
        if value is None:
            return
        if value < self.best - self.config.min_delta:
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited >= self.config.patience and trainer.global_step < trainer.max_steps:
            sign = -1 if self.metric.startswith("-") else 1
            self.reason = (
                f"{self.metric.removeprefix('-')} was no better than {sign * self.best:.6g} at {self.waited} "
                "validations in a row"
            )
            if trainer.is_global_zero:
                logger.info("early stopping at step %d: %s", trainer.global_step, self.reason)
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {"metric": self.metric, "best": self.best, "waited": self.waited, "reason": self.reason}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["metric"] == self.metric:
            self.best, self.waited = state_dict["best"], state_dict["waited"]
            self.reason = state_dict["reason"] if self.waited >= self.config.patience else None
