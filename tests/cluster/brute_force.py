"""What a sweep has shown, from its trials' metrics.csv and config.yaml alone and by nothing of the package."""

import csv
import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass
class Seen:
    """One trial, by its files."""

    name: str
    rank: int
    rate: float
    seed: int
    losses: dict[int, float]
    """Step -> validation loss of the last validation there."""
    steps: list[int]
    """Of the rows with a training loss, in their order."""


def trials_of(folder: Path) -> dict[str, Seen]:
    found = {}
    for path in sorted(folder.glob("*/metrics.csv")):
        config = yaml.safe_load((path.parent / "config.yaml").read_text())
        with path.open() as file:
            rows = list(csv.DictReader(file))
        found[path.parent.name] = Seen(
            path.parent.name, config["adapter"]["rank"], config["optimizer"]["lr"], config["seed"],
            {int(row["step"]): float(row["validation_loss"]) for row in rows if row["validation_loss"]},
            [int(row["step"]) for row in rows if row["loss"]],
        )  # fmt: skip
    return found


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def resampled(values: list[float]) -> list[float]:
    """Means of all resamples."""
    return [sum(chosen) / len(chosen) for chosen in itertools.product(values, repeat=len(values))]
