"""The common part of runs in tracking services: one run for a folder, over every start of it, and no lost row."""

import json
import logging
import time
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_peft.checkpoint.lineage import FILE_NAME as LINEAGE
from lightning_peft.tracking.charts import STEP, charts, summary_of, sweep_name
from lightning_peft.tracking.loggers import RunLogger
from lightning_peft.tracking.metrics_csv import MetricsCSV
from lightning_peft.tracking.service_record import service_record, write_record

logger = logging.getLogger(__name__)

SEND_SECONDS = 5.0
"""Time between two requests with rows; one request a step would make steps wait."""
MOST_ROWS = 50
"""Rows sent together, at most."""
PROJECT = "lightning-peft"
BAD_ENDS = ("diverged", "rolled back", "failed")
"""Ends of a run that somebody should look at."""

MetricsRow = tuple[int, dict[str, float]]
"""Step, and values by the names of the charts."""


class ServiceRun(RunLogger):
    """A run in a service, named after the run's folder and grouped by the folder's sweep.

    Its id and the last step that was sent stand in `<run_dir>/<service>_run.json`. A start logs what `metrics.csv` has
    and the service has not. A subclass opens the run and sends to it; what it raises ends this logger alone.
    """

    def __init__(self, run_dir: str, group: str | None = None, run_name: str | None = None):
        super().__init__(run_dir)
        self.group = group or sweep_name(self.run_dir)
        self.run_name = run_name or self.run_dir.resolve().name
        self.id = ""
        self.is_open = False
        self.known_step = 0
        """Last step up to which earlier starts have sent everything."""
        self.sent_step = 0
        self.rows: list[MetricsRow] = []
        self.sent_at = time.monotonic()

    @abstractmethod
    def open(self, id: str, is_new: bool) -> str:
        """Begin the run, or go on with it; return the id to keep: the one given, or one that the service has drawn."""

    @abstractmethod
    def send(self, rows: list[MetricsRow]) -> None:
        """Send scalars, with the step of each as `STEP` as well."""

    @abstractmethod
    def send_config(self, config: dict[str, Any]) -> None: ...

    @abstractmethod
    def send_adapter(self, folder: Path, lineage: Mapping[str, Any], step: int) -> None:
        """Keep the adapter folder beside the run."""

    @abstractmethod
    def conclude(self, status: str, summary: Mapping[str, Any]) -> None:
        """End the run; `summary` is flat, numbers, strings and null."""

    def begin(self, step: int) -> None:
        record = service_record(self.run_dir, self.name)
        self.id = self.open(record["id"], not record.get("is_known", False))
        self.is_open = True
        self.known_step = self.sent_step = record["step"]
        self.note(self.known_step)
        _, rows = MetricsCSV(str(self.run_dir)).read()
        lost = [row for row in rows if row["step"].isdigit() and self.known_step < int(row["step"]) <= step]
        for row in lost:
            number = int(row.pop("step"))
            self.rows.append((number, charts({key: float(value) for key, value in row.items() if value})))
        self.flush()
        if lost:
            logger.info("%s: %d rows that an earlier start did not live to send are logged now", self.name, len(lost))

    def note(self, step: int) -> None:
        """Keep what a later start goes on from: up to this step nothing is to be sent again."""
        write_record(self.run_dir, {"id": self.id, "step": step, "is_known": True}, self.name)

    def write_config(self, config: dict[str, Any]) -> None:
        self.send_config(config)

    def write_metrics(self, metrics: dict[str, float], step: int) -> None:
        # A run that failed after its last checkpoint repeats steps; those that are sent stay as they are.
        if step > self.known_step:
            self.rows.append((step, charts(metrics)))
        if time.monotonic() - self.sent_at >= SEND_SECONDS or len(self.rows) >= MOST_ROWS:
            self.flush()

    def save(self) -> None:
        """Send what is waiting."""
        self._try(self.flush)

    def flush(self) -> None:
        while self.rows:
            part = self.rows[:MOST_ROWS]
            self.send([(step, values | {STEP: float(step)}) for step, values in part])
            self.rows = self.rows[MOST_ROWS:]
            self.sent_step = max(self.sent_step, part[-1][0])
            # A validation may still follow the last step; until the run ends it counts as one to be sent again.
            self.note(max(self.known_step, self.sent_step - 1))
        self.sent_at = time.monotonic()

    def end(self, status: str, adapter: Path) -> None:
        if not self.is_open:
            return
        self.flush()
        if status == "finished" and (adapter / LINEAGE).exists():
            lineage = json.loads((adapter / LINEAGE).read_text(encoding="utf-8"))
            self.send_adapter(adapter, lineage, self.sent_step)
        self.is_open = False
        self.conclude(status, flat(summary_of(self.run_dir)) | {"status": status})
        self.note(self.sent_step)


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by dotted keys; lists as JSON."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = json.dumps(value) if isinstance(value, list | tuple) else value
    return found
