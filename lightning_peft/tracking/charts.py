"""The names under which services show what a run logs: train/..., validation/..., and the result as a summary."""

import csv
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning_peft.strict_json import read_object
from lightning_peft.tracking.cells import number_of

STEP = "trainer/global_step"
"""The x axis of every plot."""
CONSTANTS = ("trainable_parameters", "rank", "alpha")
"""Columns that never change within a run: services have them in config and summary, and no chart of them."""
SUMMARIZED = (
    "steps", "trainable_parameters", "total_parameters", "tokens_per_second", "peak_memory_gib", "seconds", "data",
)  # fmt: skip
"""Keys that the summary takes from `result.json` as they stand there."""
SWEEP_FILES = ("sweep.json", "multirun.yaml")
"""Files that mark the folder above a run folder as that of a sweep: ours, and Hydra's."""


HEALTH = "health/"
"""Columns that measure the adapter itself have charts of their own section."""


def charts(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the columns of a row under the names of W&B's charts: train/loss, validation/loss, validation/METRIC.

    Values in a row beside a validation loss were taken with it.
    """
    is_validation = "validation_loss" in metrics
    named = {key: value for key, value in metrics.items() if key not in CONSTANTS}
    if is_validation:
        return {validation_chart(key): value for key, value in named.items()}
    return {key if key.startswith(HEALTH) else f"train/{key}": value for key, value in named.items()}


def validation_chart(name: str) -> str:
    """Return the chart of what a validation gave: validation/loss, validation/loss/SOURCE, validation/METRIC."""
    return "validation/" + re.sub(r"^validation_loss(?=/|$)", "loss", name)


def sweep_name(run_dir: Path) -> str | None:
    """Return the name of the sweep folder a run folder stands in; None outside a sweep."""
    parent = run_dir.resolve().parent
    return parent.name if any((parent / name).exists() for name in SWEEP_FILES) else None


def summary_of(run_dir: Path) -> dict[str, Any]:
    """Return what `result.json` says beside the last values of the charts; empty where there is none.

    It has the smallest and the largest value of each validation chart over all starts, as validation/loss.min.
    """
    path = run_dir / "result.json"
    if not path.exists():
        return {}
    result = read_object(path, "the summary is left out")
    summary = {key: result[key] for key in SUMMARIZED if key in result}
    summary |= {validation_chart(name): value for name, value in result.get("metrics", {}).items()}
    return summary | extremes(run_dir) | {"status": result["status"]}


def whole_rows(rows: "csv.DictReader[str]") -> Iterator[dict[str, str]]:
    """Yield the rows of a table up to one that cannot be read, without those that have not a cell for each column.

    A number that a kill has cut short looks like another one.
    """
    with suppress(csv.Error):
        for row in rows:
            if None not in row and None not in row.values():
                yield row


def extremes(run_dir: Path) -> dict[str, float]:
    """Return the smallest and the largest value of each validation chart in a run's metrics.csv."""
    path = run_dir / "metrics.csv"
    if not path.is_file():
        return {}
    seen: dict[str, list[float]] = {}
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        for row in whole_rows(csv.DictReader(file)):
            numbers = {name: number for name, cell in row.items() if (number := number_of(cell)) is not None}
            if "validation_loss" in numbers and numbers.pop("step", None) is not None:
                for chart, number in charts(numbers).items():
                    seen.setdefault(chart, []).append(number)
    return {f"{chart}.{what.__name__}": what(values) for chart, values in seen.items() for what in (min, max)}
