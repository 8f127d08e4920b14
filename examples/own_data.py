"""A task of one's own with its rows: sums, scored by the share of right answers.

    lightning-peft train    imports=[own_data] data=jsonl data.source=sums data.task=sums model=tiny run_dir=runs/sums
    lightning-peft evaluate imports=[own_data] adapter_path=runs/sums

Run it where this file lies, or with its folder on PYTHONPATH.
"""

import random
from collections.abc import Iterator

from lightning_peft.tasks.registry import TASKS
from lightning_peft.tasks.task import OwnRows, Task, TaskRow

VERSION = 1
"""Part of the name under which tokens are kept: count it up when the rows change."""


def sums(split: str, seed: int, count: int | None, kind: str) -> Iterator[TaskRow]:
    """Yield rows of two numbers and their sum, each number below 100."""
    draw = random.Random(f"{seed} {split}")
    for _ in range(count or (1000 if split == "train" else 100)):
        a, b = draw.randrange(100), draw.randrange(100)
        yield {"prompt": f"{a} + {b}", "completion": str(a + b)}


def score_sums(rows: list[TaskRow], answers: list[str]) -> dict[str, float]:
    """Return `right`, the share of answers that begin with the sum."""
    hits = [(answer.split() or [""])[0] == row["completion"] for row, answer in zip(rows, answers, strict=True)]
    return {"right": hits.count(True) / len(hits)}


own_rows = OwnRows(sums, lambda: VERSION)
TASKS["sums"] = Task("sums", score_sums, headline="right", max_new_tokens=8, own_rows=own_rows)
