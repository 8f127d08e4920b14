"""What each data set is scored by."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning_peft.data.sql_grammar.database import DatabasePair
from lightning_peft.data.sql_grammar.kinds import LEVEL_SHARES
from lightning_peft.data.sql_grammar.schema import parse_schema
from lightning_peft.evaluation.metrics import (
    exact_match,
    execution_match,
    extract_sql,
    final_number_match,
    phoneme_error_rate,
)

Row = dict[str, Any]


def _share(hits: list[bool]) -> float:
    return sum(hits) / len(hits)


def _is_right_sql(row: Row, answer: str) -> bool:
    with DatabasePair(parse_schema(row["schema"]), row["seed"]) as databases:
        return execution_match(extract_sql(answer), row["completion"], databases)


def score_text_to_sql(rows: list[Row], answers: list[str]) -> dict[str, float]:
    """`execution_accuracy`, and `execution_accuracy/LEVEL` for each level among the rows."""
    by_level: dict[str, list[bool]] = defaultdict(list)
    for row, answer in zip(rows, answers, strict=True):
        by_level[row["level"]].append(_is_right_sql(row, answer))
    levels = {f"execution_accuracy/{level}": _share(hits) for level, hits in by_level.items()}
    return {"execution_accuracy": _share([hit for hits in by_level.values() for hit in hits]), **levels}


def score_cmudict(rows: list[Row], answers: list[str]) -> dict[str, float]:
    """`exact_match` and `phoneme_error_rate` (may exceed 1), on the first line of each answer."""
    golds = [row["completion"] for row in rows]
    phonemes = [(answer.strip().splitlines() or [""])[0] for answer in answers]
    hits = [exact_match(answer, gold) for answer, gold in zip(phonemes, golds, strict=True)]
    return {"exact_match": _share(hits), "phoneme_error_rate": phoneme_error_rate(phonemes, golds)}


def score_final_number(rows: list[Row], answers: list[str]) -> dict[str, float]:
    """`final_number_accuracy`: the number after `####`, or the last one where an answer has no `####`."""
    hits = [final_number_match(answer, row["completion"]) for row, answer in zip(rows, answers, strict=True)]
    return {"final_number_accuracy": _share(hits)}


def score_nothing(rows: list[Row], answers: list[str]) -> dict[str, float]:
    """No metric besides the loss."""
    return {}


@dataclass(frozen=True)
class Sample:
    """One row with the answers of several models, for people to read."""

    prompt: str
    expected: str
    answers: dict[str, tuple[str, bool | None]]
    """For each model what it answered and whether that is right; None where nothing is judged."""


@dataclass(frozen=True)
class Task:
    """How the answers of a data set are made and scored; rows need `prompt`, `completion`, and what `score` reads."""

    name: str
    score: Callable[[list[Row], list[str]], dict[str, float]]
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
    """What `score` returns; where it is left out, the headline alone is known before rows are scored."""
    small_is_good: tuple[str, ...] = ()
    """Those of the metrics that are to be small; of the others a large one is good."""
    columns: tuple[str, ...] = ()
    """Columns that `score` reads beside `prompt` and `completion`."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the metrics as far as they are known without rows."""
        return self.metrics or (() if self.headline is None else (self.headline,))

    def few_shot(self, train_rows: list[Row]) -> list[Row]:
        """The first `num_shots` training rows, each of another value of `spread_shots_by` as far as there are any."""
        if self.spread_shots_by is None:
            return train_rows[: self.num_shots]
        first_of_value: dict[Any, Row] = {}
        for row in train_rows:
            first_of_value.setdefault(row[self.spread_shots_by], row)
        spread = list(first_of_value.values())[: self.num_shots]
        return (spread + [row for row in train_rows if row not in spread])[: self.num_shots]

    def is_right(self, row: Row, answer: str) -> bool | None:
        """Whether one answer counts; None where there is only the loss."""
        return None if self.headline is None else self.score([row], [answer])[self.headline] == 1.0

    def samples(self, rows: list[Row], answers: dict[str, list[str]], count: int) -> list[Sample]:
        """`count` rows evenly spaced over `rows`; `answers` has one list a model, one answer a row."""
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


TASKS = {
    "text_to_sql": Task(
        "text_to_sql",
        score_text_to_sql,
        headline="execution_accuracy",
        max_new_tokens=64,
        num_shots=3,
        spread_shots_by="level",
        shown=extract_sql,
        metrics=("execution_accuracy", *(f"execution_accuracy/{level}" for level in LEVEL_SHARES)),
        columns=("schema", "seed", "level"),
    ),
    "cmudict": Task(
        "cmudict",
        score_cmudict,
        headline="exact_match",
        max_new_tokens=48,
        num_shots=3,
        metrics=("exact_match", "phoneme_error_rate"),
        small_is_good=("phoneme_error_rate",),
    ),
    "final_number": Task("final_number", score_final_number, headline="final_number_accuracy", max_new_tokens=256),
    "none": Task("none", score_nothing, headline=None, max_new_tokens=0),
}
