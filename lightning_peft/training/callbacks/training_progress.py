"""One line for a whole training run: a bar on a terminal, plain lines in logs and pipes."""

import logging
import time
from collections import deque
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from lightning_peft import distributed, readable
from lightning_peft.compat import is_accumulating
from lightning_peft.progress import BAR_WIDTH, SCREEN, SECONDS_BETWEEN_LINES, SECONDS_BETWEEN_LOOKS, Part, drawn_bar
from lightning_peft.training.callbacks.step_metrics import peak_memory_gib

logger = logging.getLogger(__name__)

SHORTEST_BAR = 3
REMEMBERED_LOOKS = 20
"""Looks at the run over which speed and time left are measured."""


class RunPart(Part):
    """The figures known of a run, read from the device only when they are shown."""

    def __init__(self, total: int):
        super().__init__("training", total)
        self.loss: float | None = None
        self.validation_loss: float | None = None
        self.lr = 0.0
        self.memory_gib = 0.0
        self.tokens = 0
        self.looks: deque[tuple[float, int, int]] = deque(maxlen=REMEMBERED_LOOKS)
        """Time, step and tokens."""

    def look(self, step: int) -> None:
        self.done = step
        self.looks.append((time.monotonic(), step, self.tokens))

    def per_second(self, value: int) -> float:
        """Return how fast steps (1) or tokens (2) went over the remembered looks, 0 before there are two."""
        if not self.looks:
            return 0.0
        first, last = self.looks[0], self.looks[-1]
        return (last[value] - first[value]) / (last[0] - first[0]) if last[0] > first[0] else 0.0

    @property
    def seconds_left(self) -> float | None:
        steps_per_second = self.per_second(1)
        return ((self.total or 0) - self.done) / steps_per_second if steps_per_second else None

    def figures(self, is_short: bool = False) -> dict[str, str]:
        """Return what is known, by name, in the order in which it reads best."""
        speed, left = self.per_second(2), self.seconds_left
        digits = 0 if is_short and self.memory_gib >= 9.5 else 1
        count, duration = (
            (readable.short_count(speed), readable.short_duration) if is_short else (f"{speed:,.0f}", readable.duration)
        )
        known = {
            "step": self.count,
            "loss": self.loss is not None and f"loss {readable.loss(self.loss)}",
            "validation": self.validation_loss is not None and f"val {readable.loss(self.validation_loss)}",
            "lr": self.loss is not None and f"lr {readable.exponent(self.lr, 2 if is_short else 3)}",
            "speed": speed > 0 and f"{count} tok/s",
            "memory": self.memory_gib > 0 and f"{self.memory_gib:.{digits}f} GiB",
            "time": left is not None and f"{duration(left)} left",
        }
        return {name: figure for name, figure in known.items() if figure}

    def text(self, width: int) -> str:
        line, gap = self.fitting_line(width)
        room = width - 1 - len(line) - len(gap)
        return drawn_bar(self.share or 0.0, min(room, BAR_WIDTH)) + gap + line if room >= SHORTEST_BAR else line

    def fitting_line(self, width: int) -> tuple[str, str]:
        """Return the figures below `width` columns, with room for a bar unless some are left out; and the gap."""
        for is_short, gap in ((False, "  "), (False, " "), (True, " ")):
            line = gap.join(self.figures(is_short).values())
            if len(line) + len(gap) + SHORTEST_BAR < width:
                return line, gap
        figures = self.figures(is_short=True)
        for name in ("", "memory", "lr", "speed", "time"):
            figures.pop(name, None)
            if len(line := " ".join(figures.values())) < width:
                break
        return line, " "

    def log_line(self) -> str:
        return f"step {'  '.join(self.figures().values())}"


class TrainingProgress(ProgressBar):
    """Shows step, losses, learning rate, tokens/s, peak memory and time left, on rank zero.

    tokens/s are those of all ranks, taken to be as many on each; memory is rank zero's. Off a terminal that is a log
    line at the first and the last step and at most every ten seconds between.
    """

    def __init__(self) -> None:
        super().__init__()
        self.enabled = distributed.rank() == 0
        self.run: RunPart | None = None
        self.validation: Part | None = None
        self.first_step = 0
        self.shown = 0.0

    def disable(self) -> None:
        self.enabled = False

    def enable(self) -> None:
        self.enabled = distributed.rank() == 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.run = RunPart(int(trainer.estimated_stepping_batches))
        self.run.look(trainer.global_step)
        self.first_step = trainer.global_step
        self.shown = time.monotonic()
        if self.enabled:
            SCREEN.open(self.run)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self.run is not None
        self.run.tokens += batch.num_tokens * trainer.world_size
        if not self.enabled or is_accumulating(trainer):
            return
        pause = SECONDS_BETWEEN_LINES if SCREEN.terminal is None else SECONDS_BETWEEN_LOOKS
        is_end = trainer.global_step in (self.first_step + 1, self.run.total)
        if not is_end and time.monotonic() - self.shown < pause:
            return
        self.shown = time.monotonic()
        self.read(self.run, trainer, pl_module)
        if SCREEN.terminal is None:
            logger.info("%s", self.run.log_line())
        else:
            SCREEN.renew(self.run)

    def read(self, run: RunPart, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics: Any = pl_module.step_metrics
        run.loss = float(metrics["loss"])
        run.lr = trainer.optimizers[0].param_groups[0]["lr"]
        run.memory_gib = peak_memory_gib(trainer.strategy.root_device)
        run.look(trainer.global_step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.enabled:
            self.validation = Part("validation", sum(trainer.num_val_batches))
            self.validation.__enter__()

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if self.validation is not None:
            self.validation.advance()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.end_validation()
        if self.run is not None and (loss := trainer.callback_metrics.get("validation_loss")) is not None:
            self.run.validation_loss = float(loss)

    def end_validation(self) -> None:
        if self.validation is not None:
            self.validation.__exit__(None, None, None)
            self.validation = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.end()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.end()

    def end(self) -> None:
        self.end_validation()
        if self.run is not None:
            SCREEN.close(self.run)
