"""The run's own log: metrics.csv, one row an optimiser step, continuous over resumes."""

import csv
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

COLUMNS = [
    "step", "loss", "grad_norm", "lr", "tokens", "supervised_tokens", "step_seconds", "tokens_per_second",
    "peak_memory_gib", "validation_loss",
]  # fmt: skip


class MetricsCSV(Logger):
    """Appends rows to `<run_dir>/metrics.csv`; a resumed run first cuts the rows past its checkpoint."""

    def __init__(self, run_dir: str):
        super().__init__()
        self.path = Path(run_dir) / "metrics.csv"

    @property
    def name(self) -> str:
        return "metrics.csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The resolved config stands in config.yaml beside the file."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        known = {key: value for key, value in metrics.items() if key in COLUMNS}
        if not known:
            return
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerow({"step": step} | known)

    @rank_zero_only
    def cut_after(self, step: int) -> None:
        """Drop the rows of steps that the checkpoint at `step` does not contain."""
        if not self.path.exists():
            return
        with self.path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["step"].isdigit() and int(row["step"]) <= step]
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(self.path)
