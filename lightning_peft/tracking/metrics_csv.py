"""The run's own log: metrics.csv, one row an optimiser step, continuous over resumes."""

import csv
import logging
import os
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from lightning_peft.tracking.loggers import RunLogger

logger = logging.getLogger(__name__)

COLUMNS = [
    "step", "loss", "grad_norm", "lr", "tokens", "supervised_tokens", "step_seconds", "tokens_per_second",
    "peak_memory_gib", "validation_loss",
]  # fmt: skip
"""The first columns; scalars of other names get columns after these."""


class MetricsCSV(RunLogger):
    """Appends rows to `<run_dir>/metrics.csv`; a resumed run first cuts the rows past its checkpoint.

    Rows that cannot be written, as on a full disk, wait in memory for the next one that can.
    """

    def __init__(self, run_dir: str):
        super().__init__(run_dir)
        self.path = self.run_dir / "metrics.csv"
        self.columns: list[str] = []
        self.waiting: list[dict[str, Any]] = []
        self.is_behind = False
        """True while rows that were to be written before wait."""

    @property
    def name(self) -> str:
        return "metrics.csv"

    def write_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.waiting.append({"step": step} | metrics)
        try:
            self.append()
        except OSError as error:
            if not self.is_behind:
                logger.warning("%s: %s; rows wait in memory until they can be written", self.path, error.strerror)
            self.is_behind = True
            return
        if self.is_behind:
            logger.warning("%s: written again, with the rows that waited", self.path)
        self.is_behind = False

    def append(self) -> None:
        """Write the rows that wait, all of them or none. Raises OSError."""
        names = list(dict.fromkeys(key for row in self.waiting for key in row))
        if not self.columns or not set(names) <= set(self.columns):
            columns, rows = self.read()
            columns += [key for key in names if key not in columns]
            self.rewrite(columns, rows)
        size = self.path.stat().st_size
        try:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns).writerows(self.waiting)
        except OSError:
            os.truncate(self.path, size)
            raise
        self.waiting.clear()

    def end(self, status: str, adapter: Path) -> None:
        """Write what still waits. Raises OSError for a finished run; else the steps since the checkpoint come again."""
        if self.waiting:
            with nullcontext() if status == "finished" else suppress(OSError):
                self.append()

    def begin(self, step: int) -> None:
        """Drop the rows of steps that the checkpoint at `step` does not contain."""
        if self.path.exists():
            columns, rows = self.read()
            self.rewrite(columns, [row for row in rows if row["step"].isdigit() and int(row["step"]) <= step])

    def read(self) -> tuple[list[str], list[dict[str, Any]]]:
        """Return (columns, rows) of the file as it stands."""
        if not self.path.exists():
            return list(COLUMNS), []
        with self.path.open(newline="", encoding="utf-8", errors="replace") as file:  # a crash may leave anything
            reader = csv.DictReader(file)
            rows = list(reader)
        return list(reader.fieldnames or COLUMNS), rows

    def rewrite(self, columns: list[str], rows: list[dict[str, Any]]) -> None:
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            # A row that a kill cut short has fewer fields, never more.
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(self.path)
        self.columns = columns
