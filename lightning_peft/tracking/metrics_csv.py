"""The run's own log: metrics.csv, one row an optimiser step, continuous over resumes."""

import csv
from typing import Any

from lightning_peft.tracking.loggers import RunLogger

COLUMNS = [
    "step", "loss", "grad_norm", "lr", "tokens", "supervised_tokens", "step_seconds", "tokens_per_second",
    "peak_memory_gib", "validation_loss",
]  # fmt: skip
"""The first columns; scalars of other names get columns after these."""


class MetricsCSV(RunLogger):
    """Appends rows to `<run_dir>/metrics.csv`; a resumed run first cuts the rows past its checkpoint."""

    def __init__(self, run_dir: str):
        super().__init__(run_dir)
        self.path = self.run_dir / "metrics.csv"
        self.columns: list[str] = []

    @property
    def name(self) -> str:
        return "metrics.csv"

    def write_metrics(self, metrics: dict[str, float], step: int) -> None:
        if not self.columns or not metrics.keys() <= set(self.columns):
            self.columns, rows = self.read()
            self.columns += [key for key in metrics if key not in self.columns]
            self.rewrite(rows)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow({"step": step} | metrics)

    def begin(self, step: int) -> None:
        """Drop the rows of steps that the checkpoint at `step` does not contain."""
        if self.path.exists():
            self.columns, rows = self.read()
            self.rewrite([row for row in rows if row["step"].isdigit() and int(row["step"]) <= step])

    def read(self) -> tuple[list[str], list[dict[str, Any]]]:
        """Return (columns, rows) of the file as it stands."""
        if not self.path.exists():
            return list(COLUMNS), []
        with self.path.open(newline="", encoding="utf-8", errors="replace") as file:  # a crash may leave anything
            reader = csv.DictReader(file)
            rows = list(reader)
        return list(reader.fieldnames or COLUMNS), rows

    def rewrite(self, rows: list[dict[str, Any]]) -> None:
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            # A row that a kill cut short has fewer fields, never more.
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(self.path)
