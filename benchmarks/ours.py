"""`lightning-peft train`, taking its steps in turn with other processes."""

import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks.memory import PeakMemory, synchronize
from benchmarks.turns import WARM_UP_STEPS, Turns, run_in_turns


class TakeTurns(Callback):
    """Asks for its turn before each batch; `train` creates it before the model is loaded."""

    def __init__(self) -> None:
        self.turns = Turns(synchronize, PeakMemory())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.turns.begin()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.turns.loss = float(pl_module.step_metrics["loss"])  # type: ignore[arg-type, index]
        self.turns.tokens = batch.num_tokens

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.turns.end()


def train_command(overrides: Sequence[str], steps: int, run_dir: Path) -> list[str]:
    """Return the command that trains in turns; validation and samples are off."""
    return [
        sys.executable, "-m", "lightning_peft", "train", *overrides, f"trainer.max_steps={steps}", "logger=none",
        f"run_dir={run_dir}", "+callbacks.turns._target_=benchmarks.ours.TakeTurns",
    ]  # fmt: skip


def measure_runs(runs: Mapping[str, Sequence[str]], steps: int, timeout: float = 1800) -> dict[str, dict[str, Any]]:
    """Run `train` with each of the overrides in turn; return `run_in_turns`' values by name, with medians after
    warm-up.

    Raises RuntimeError when a run fails.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        commands = {
            name: train_command(words, steps, folder / f"run{place}")
            for place, (name, words) in enumerate(runs.items())
        }
        sides = run_in_turns(commands, steps, folder, timeout)
    for side in sides.values():
        timed = list(zip(side["seconds"], side["tokens"], strict=True))[WARM_UP_STEPS:]
        side["step_seconds"] = statistics.median(seconds for seconds, _ in timed)
        side["tokens_per_second"] = statistics.median(tokens / seconds for seconds, tokens in timed)
    return sides


def peak_gib(side: dict[str, Any]) -> float:
    """Return the peak that counts: allocated on the device, else anonymous memory above what the imports hold."""
    peak: dict[str, float] = side["peak"]
    return peak.get("device_gib", peak["anonymous_gib"])
