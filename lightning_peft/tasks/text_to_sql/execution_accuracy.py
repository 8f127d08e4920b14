"""The task `text_to_sql`: the share of answers that return what the right SQL does, on two databases each."""

from collections import defaultdict

from lightning_peft.tasks.task import OwnRows, Task, TaskRow, share
from lightning_peft.tasks.text_to_sql.answers import execution_match, extract_sql
from lightning_peft.tasks.text_to_sql.grammar.database import DatabasePair
from lightning_peft.tasks.text_to_sql.grammar.database_schema import parse_schema
from lightning_peft.tasks.text_to_sql.grammar.kinds import LEVEL_SHARES
from lightning_peft.tasks.text_to_sql.rows import rows_of_kind


def _is_right_sql(row: TaskRow, answer: str) -> bool:
    with DatabasePair(parse_schema(row["schema"]), row["seed"]) as databases:
        return execution_match(extract_sql(answer), row["completion"], databases)


def score_text_to_sql(rows: list[TaskRow], answers: list[str]) -> dict[str, float]:
    """Return `execution_accuracy`, and `execution_accuracy/LEVEL` for each level among the rows, the easiest first."""
    by_level: dict[str, list[bool]] = defaultdict(list)
    for row, answer in zip(rows, answers, strict=True):
        by_level[row["level"]].append(_is_right_sql(row, answer))
    everything = share([hit for hits in by_level.values() for hit in hits])
    levels = [level for level in dict.fromkeys([*LEVEL_SHARES, *by_level]) if level in by_level]
    return {"execution_accuracy": everything} | {
        f"execution_accuracy/{level}": share(by_level[level]) for level in levels
    }


TASK = Task(
    "text_to_sql",
    score_text_to_sql,
    headline="execution_accuracy",
    max_new_tokens=64,
    num_shots=3,
    spread_shots_by="level",
    shown=extract_sql,
    metrics=("execution_accuracy", *(f"execution_accuracy/{level}" for level in LEVEL_SHARES)),
    is_mean_of_rows=True,
    columns=("schema", "seed", "level"),
    own_rows=OwnRows(rows_of_kind),
)
