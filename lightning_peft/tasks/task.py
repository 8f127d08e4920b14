"""A task's description of itself: its own rows, the metric of its answers, how they are made and shown."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

TaskRow = dict[str, Any]


def share(hits: list[bool]) -> float:
    """Return the share of True."""
    return sum(hits) / len(hits)


def score_nothing(rows: list[TaskRow], answers: list[str]) -> dict[str, float]:
    """Return no metric besides the loss."""
    return {}


@dataclass(frozen=True)
class OwnRows:
    """Rows that a task makes or brings itself, taken by `data.source` of its name."""

    make: Callable[[str, int, int | None, str], Iterable[TaskRow]]
    """Function that gives the rows of a split (train, validation or test) for `data.split_seed`, so many of them or the
    task's own number where none is asked for, of a kind of `data.rows`: answers, pairs or labelled."""
    version: Callable[[], Any] = lambda: None
    """Values that decide the rows beside these arguments and the project's own code, fit for JSON."""


@dataclass(frozen=True)
class Sample:
    """One row with the answers of several models, for people to read."""

    prompt: str
    expected: str
    answers: dict[str, tuple[str, bool | None]]
    """Each model's answer and whether it is right; None where nothing is judged."""


@dataclass(frozen=True)
class Task:
    """The making and scoring of a data set's answers; rows need `prompt`, `completion`, and what `score` reads."""

    name: str
    score: Callable[[list[TaskRow], list[str]], dict[str, float]]
    headline: str | None
    """The metric of `score` that sums it up; None where there is only the loss."""
    max_new_tokens: int
    """Longest answer; 0 generates none."""
    num_shots: int = 0
    """Examples from the training rows that a model without the adapter is shown."""
    spread_shots_by: str | None = None
    """Column of which each shot takes another value."""
    shown: Callable[[str], str] = str.strip
    """The part of an answer that counts, for people to read."""
    num_rows: int = 200
    """Rows scored by default."""
    metrics: tuple[str, ...] = ()
    """Names of what `score` returns; where it is left out, the headline alone is known before rows are scored."""
    small_is_good: tuple[str, ...] = ()
    """Metrics that are to be small; of the others a large one is good."""
    is_mean_of_rows: bool = False
    """True where each metric of `score` is the mean of its values on single rows, over the rows that have it; then a
    row is scored once, where its own values are wanted too."""
    columns: tuple[str, ...] = ()
    """Columns that `score` reads beside `prompt` and `completion`."""
    own_rows: OwnRows | None = None
    """The rows the task brings; None for one that scores rows from elsewhere."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Return the names of the metrics as far as they are known without rows."""
        return self.metrics or (() if self.headline is None else (self.headline,))

    def few_shot(self, train_rows: list[TaskRow]) -> list[TaskRow]:
        """Return the first `num_shots` training rows, each of another value of `spread_shots_by` as far as possible."""
        if self.spread_shots_by is None:
            return train_rows[: self.num_shots]
        first_of_value: dict[Any, TaskRow] = {}
        for row in train_rows:
            first_of_value.setdefault(row[self.spread_shots_by], row)
        spread = list(first_of_value.values())[: self.num_shots]
        return (spread + [row for row in train_rows if row not in spread])[: self.num_shots]

    def is_right(self, row: TaskRow, answer: str) -> bool | None:
        """Return whether one answer counts; None where there is only the loss."""
        return None if self.headline is None else self.score([row], [answer])[self.headline] == 1.0

    def samples(self, rows: list[TaskRow], answers: dict[str, list[str]], count: int) -> list[Sample]:
        """Return `count` samples evenly spaced over `rows`; `answers` has one list a model, one answer a row."""
        count = min(count, len(rows))
        chosen = [index * len(rows) // count for index in range(count)]
        return [
            Sample(
                rows[i]["prompt"],
                rows[i]["completion"],
                {name: (self.shown(given[i]), self.is_right(rows[i], given[i])) for name, given in answers.items()},
            )
            for i in chosen
        ]
