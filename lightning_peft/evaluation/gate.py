"""Decide whether an adapter may be shipped, from the interval of its improvement over its base by each metric."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from lightning_peft.tasks.task import Task, TaskRow

DRAWS = 2000
"""Resamples of the rows behind an interval."""
CONFIDENCE = 0.95


class DoNotShip(SystemExit):
    """The adapter fails its gate."""

    exit_status = 4

    def __init__(self) -> None:
        super().__init__(self.exit_status)


@dataclass(frozen=True)
class Metric:
    """One metric of one model."""

    value: float
    rows: list[float] = field(default_factory=list)
    """Its value on each row alone, nan where a row has none; empty where the metric is no mean over rows."""
    small_is_good: bool = False

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """Return the 95 % bootstrap interval of the mean over rows; None where it is no such mean."""
        return bootstrap(self.rows)


@dataclass(frozen=True)
class Verdict:
    """The gate's verdict on one metric."""

    name: str
    least: float
    """The improvement that is asked for; a number below 0 is the loss that is allowed."""
    improvement: float
    """Adapter minus base, the other way round where small is good."""
    interval: tuple[float, float] | None
    """The interval of the improvement, from the same rows resampled for both models."""

    @property
    def passes(self) -> bool:
        """Return whether the lower end of the interval is enough; the improvement itself where there is no interval."""
        lower = self.improvement if self.interval is None else self.interval[0]
        return lower >= self.least - 1e-12

    def words(self) -> str:
        """Return one line for people."""
        within = "no interval" if self.interval is None else f"95 % {self.interval[0]:+.4g} to {self.interval[1]:+.4g}"
        line = f"{self.name}: {self.improvement:+.4g} ({within}), asked for at least {self.least:+.4g}: "
        if self.passes:
            return line + "passes"
        is_open = self.interval is not None and self.interval[1] >= self.least
        return line + ("not shown, more rows would tell" if is_open else "fails")


def bootstrap(rows: Sequence[float], seed: int = 0) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean of what is no nan; None without two values."""
    values = np.asarray([value for value in rows if not math.isnan(value)], dtype=np.float64)
    if len(values) < 2:
        return None
    chosen = np.random.default_rng(seed).integers(0, len(values), (DRAWS, len(values)))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values[chosen].mean(1), [tail, 1 - tail])
    return float(low), float(high)


def row_scores(task: Task, rows: list[TaskRow], answers: list[str]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Return the task's metrics, and the value on every row alone of those that are means over rows, else nan."""
    singles = [task.score([row], [answer]) for row, answer in zip(rows, answers, strict=True)]
    metrics = mean_over_rows(singles) if task.is_mean_of_rows else task.score(rows, answers)
    found = {}
    for name, value in metrics.items():
        values = [float(single.get(name, math.nan)) for single in singles]
        kept = [each for each in values if not math.isnan(each)]
        if kept and math.isclose(sum(kept) / len(kept), value, rel_tol=1e-6, abs_tol=1e-9):
            found[name] = values
    return metrics, found


def scores_by_source(
    task: Task, rows: list[TaskRow], answers: list[str], sources: Sequence[str], by_row: Mapping[str, list[float]]
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Return the task's metrics over the rows of each source of a mixture as METRIC/SOURCE, and their values by row.

    sources: the source of each row, empty without a mixture; by_row: the values that `row_scores` found.
    """
    metrics: dict[str, float] = {}
    found: dict[str, list[float]] = {}
    for source in dict.fromkeys(name for name in sources if name):
        places = [place for place, name in enumerate(sources) if name == source]
        values = {name: [rows_of[place] for place in places] for name, rows_of in by_row.items()}
        if task.is_mean_of_rows:
            kept = {name: [each for each in some if not math.isnan(each)] for name, some in values.items()}
            scores = {name: sum(some) / len(some) for name, some in kept.items() if some}
        else:
            scores = task.score([rows[place] for place in places], [answers[place] for place in places])
        metrics |= {f"{name}/{source}": value for name, value in scores.items()}
        found |= {f"{name}/{source}": some for name, some in values.items() if name in scores}
    return metrics, found


def mean_over_rows(singles: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of every metric over the rows that have it."""
    values: dict[str, list[float]] = {}
    for single in singles:
        for name, value in single.items():
            values.setdefault(name, []).append(value)
    return {name: sum(found) / len(found) for name, found in values.items()}


def verdicts(gate: Mapping[str, float], base: Mapping[str, Metric], adapter: Mapping[str, Metric]) -> list[Verdict]:
    """Compare adapter and base by every threshold. Raises ValueError for a metric that was not taken."""
    found = []
    for name, least in gate.items():
        if name not in base or name not in adapter:
            raise ValueError(f"gate.{name}={least:g}: was not scored; there are {', '.join(adapter)}")
        one, other = adapter[name], base[name]
        sign = -1.0 if one.small_is_good else 1.0
        pairs = zip(one.rows, other.rows, strict=True) if len(one.rows) == len(other.rows) else []
        differences = [sign * (own - before) for own, before in pairs]
        found.append(Verdict(name, least, sign * (one.value - other.value), bootstrap(differences)))
    return found
