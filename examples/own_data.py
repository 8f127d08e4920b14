"""A data source and a task of one's own: sums as rows, scored by the share of right answers.

    lightning-peft train    imports=[own_data] data=jsonl data.source=sums data.task=sums model=tiny run_dir=runs/sums
    lightning-peft evaluate imports=[own_data] adapter_path=runs/sums

Run it where this file lies, or with its folder on PYTHONPATH.
"""

import random
from collections.abc import Iterator
from typing import Any

from lightning_peft.data.config import DataConfig
from lightning_peft.data.conversation import Row
from lightning_peft.data.sources import SOURCES, Shard, Source
from lightning_peft.evaluation.tasks import TASKS, Task

VERSION = 1
"""Part of the name under which tokens are kept: count it up when the rows change."""


def sums(seed: int, split: str, count: int) -> Iterator[Row]:
    """Yield rows of two numbers and their sum, each number below 100."""
    draw = random.Random(f"{seed} {split}")
    for number in range(count):
        a, b = draw.randrange(100), draw.randrange(100)
        yield Row({"prompt": f"{a} + {b}", "completion": str(a + b)}, f"sums {split} row {number + 1}")


def shards(config: DataConfig, split: str) -> list[Shard]:
    count = (config.max_rows or 1000) if split == "train" else (config.max_validation_rows or 100)
    return [lambda: sums(config.split_seed, split, count)]


def score_sums(rows: list[dict[str, Any]], answers: list[str]) -> dict[str, float]:
    """Return `right`, the share of answers that begin with the sum."""
    hits = [(answer.split() or [""])[0] == row["completion"] for row, answer in zip(rows, answers, strict=True)]
    return {"right": hits.count(True) / len(hits)}


SOURCES["sums"] = Source(lambda config: {"train", "validation", "test"}, shards, lambda config, split: VERSION)
TASKS["sums"] = Task("sums", score_sums, headline="right", max_new_tokens=8)
