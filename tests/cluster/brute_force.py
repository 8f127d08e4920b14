"""The results of a sweep, from its trials' metrics.csv and config.yaml alone and by nothing of the package."""

import csv
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass
class Seen:
    """One trial, by its files."""

    name: str
    rank: int
    alpha: float
    rate: float
    seed: int
    losses: dict[int, float]
    """Step -> validation loss of the last validation there."""
    steps: list[int]
    """Losses of the rows with a training loss, in their order."""


def trials_of(folder: Path) -> dict[str, Seen]:
    found = {}
    for path in sorted(folder.glob("*/metrics.csv")):
        config = yaml.safe_load((path.parent / "config.yaml").read_text())
        with path.open() as file:
            rows = list(csv.DictReader(file))
        found[path.parent.name] = Seen(
            path.parent.name, config["adapter"]["rank"], config["adapter"]["alpha"],
            config["optimizer"]["lr"], config["seed"],
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
    """Return the means of all resamples."""
    return [sum(chosen) / len(chosen) for chosen in itertools.product(values, repeat=len(values))]


def expected_sentence(all_trials: dict[str, Seen], setting: Callable[[Seen], tuple[str, ...]], end: int) -> str:
    """Return the sentence of a pruned sweep over ranks, rates, seeds and what else `setting` tells apart.

    All trials are looked at, of which those that have reached step `end` count. A rank's setting with the best mean is
    taken. Adapters of LoRA: a rank has its share of the largest one's parameters.
    """
    groups: dict[tuple[int, tuple[str, ...]], list[Seen]] = {}
    for trial in all_trials.values():
        groups.setdefault((trial.rank, setting(trial)), []).append(trial)
    losses = {key: [t.losses[end] for t in trials if end in t.losses] for key, trials in groups.items()}
    means = {key: sum(found) / len(found) for key, found in losses.items() if found}
    best = {
        rank: min((k for k in means if k[0] == rank), key=means.__getitem__) for rank in sorted({k[0] for k in means})
    }

    def interval(one: int, other: int) -> tuple[float, float] | None:
        pair = [losses[best[rank]] for rank in (one, other)]
        if min(map(len, pair)) < 2:
            return None
        found = [a - b for a in resampled(pair[0]) for b in resampled(pair[1])]
        return quantile(found, 0.025), quantile(found, 0.975)

    def is_noise(one: int, other: int) -> bool:
        found = interval(one, other)
        return found is not None and found[0] <= 0 <= found[1]

    def pruned(*ranks: int) -> str:
        among = [trial for rank in ranks for trial in groups[best[rank]]]
        stopped = sum(end not in trial.losses for trial in among)
        said = f"; of these {len(among)} trials rungs stopped {stopped}, so the means are of those that were ahead"
        return said if stopped else ""

    def seeds(*ranks: int) -> str:
        return " and ".join(map(str, sorted({len(losses[best[rank]]) for rank in ranks})))

    winner = min(best, key=lambda rank: means[best[rank]])
    if len(best) < 2:
        raise AssertionError("one rank alone reached the end: give the sweep more trials")
    reference = max(best) if winner == max(best) or is_noise(winner, max(best)) else winner
    for rank in best:
        if rank < reference and is_noise(rank, reference):
            low, high = interval(rank, reference)
            share = {2: "half", 4: "a quarter"}[reference // rank]
            return (
                f"rank {rank} is within noise of rank {reference} at {share} of the parameters: validation_loss "
                f"{means[best[rank]]:.4g} and {means[best[reference]]:.4g}, 95 % of the difference from {low:.2g} to "
                f"{high:.2g} over {seeds(rank, reference)} seeds; each at its best alpha, lr{pruned(rank, reference)}"
            )
    second = min((rank for rank in best if rank != winner), key=lambda rank: means[best[rank]])
    figures = [f"{means[best[rank]]:.4g}" for rank in (winner, second)]
    said = f"rank {winner} is best: validation_loss {figures[0]}, against {figures[1]} of rank {second}"
    found, how = interval(winner, second), f"each at its best alpha, lr{pruned(winner, second)}"
    if found is None:
        return f"{said}; one seed each, so noise is unknown; {how}"
    verdict = "within" if found[0] <= 0 <= found[1] else "beyond"
    return (
        f"{said}, {verdict} noise: 95 % of the difference from {found[0]:.2g} to {found[1]:.2g} over "
        f"{seeds(winner, second)} seeds; {how}"
    )
