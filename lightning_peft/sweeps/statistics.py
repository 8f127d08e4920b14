"""The findings of all a sweep's trials: means over seeds, how sure they are, and which rank is worth its parameters."""

import itertools
import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_peft.sweeps.sweep import HYDRA, PAUSED, Sweep, Trial, score

SEED = "seed"
RATE = "optimizer.lr"
RANKS = ("adapter.rank", "rank")
"""The keys that a rank is swept by; the group's options are called r4, r8 ..."""
RESAMPLES = 10_000
"""Draws of the bootstrap; where all resamples are no more than this, each is taken once."""
SHARES = {2: "half", 3: "a third", 4: "a quarter", 8: "an eighth", 16: "a sixteenth", 32: "a thirty-second"}
"""Words for one part of so many."""
NEXT_SEEDS = ["0", "1", "2"]


@dataclass(frozen=True)
class SeedGroup:
    """Trials that differ in their seed only."""

    values: dict[str, str]
    """Swept key to value, without the seed."""
    names: list[str]
    """Names of all its trials."""
    scores: list[float]
    """The metric of those that finished with a finite number."""
    parameters: int | None
    """Trained parameters of a trial."""

    @property
    def mean(self) -> float:
        """Return the mean of the scores; nan without any."""
        return statistics.fmean(self.scores) if self.scores else math.nan

    @property
    def spread(self) -> float | None:
        """Return the standard deviation of the scores (n - 1); None for fewer than two."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Return the middle 95 % of the means of resampled scores; None for fewer than two."""
        return bounds(resampled_means(self.scores)) if len(self.scores) > 1 else None

    @property
    def label(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.values.items()) or "all trials"


def resampled_means(scores: Sequence[float], seed: int = 0) -> NDArray[np.float64]:
    """Return the means of samples of as many scores, drawn with replacement: every one, or RESAMPLES random ones."""
    count, values = len(scores), np.asarray(scores, dtype=np.float64)
    if count**count <= RESAMPLES:
        return np.array([values[list(chosen)].mean() for chosen in itertools.product(range(count), repeat=count)])
    draws = np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
    return np.asarray(values[draws].mean(axis=1))


def bounds(means: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def difference_interval(one: SeedGroup, other: SeedGroup) -> tuple[float, float] | None:
    """Return the middle 95 % of the difference of the two means, resampled apart; None with fewer than two scores."""
    if min(len(one.scores), len(other.scores)) < 2:
        return None
    means, others = resampled_means(one.scores), resampled_means(other.scores, seed=1)
    if len(means) == len(others) == RESAMPLES:
        return bounds(means - others)
    return bounds(np.subtract.outer(means, others).ravel())


def groups_of(sweep: Sweep) -> list[SeedGroup]:
    """Return the trials by what they have in common beside the seed, in the order of the sweep."""
    found: dict[tuple[tuple[str, str], ...], list[Trial]] = {}
    for trial in sweep.trials:
        found.setdefault(tuple((key, value) for key, value in trial.values.items() if key != SEED), []).append(trial)
    sign = -1.0 if sweep.metric.startswith("-") else 1.0
    groups = []
    for values, trials in found.items():
        # The same values and the same seed once more are the same measurement.
        by_seed: dict[str | None, float] = {}
        for trial in trials:
            if (value := score(sweep, trial)) is not None:
                by_seed.setdefault(trial.values.get(SEED), sign * value)
        scores = list(by_seed.values())
        counts = [(trial.result or {}).get("trainable_parameters") for trial in trials]
        parameters = next((count for count in counts if count is not None), None)
        groups.append(SeedGroup(dict(values), [trial.name for trial in trials], scores, parameters))
    return groups


def best_first(groups: Sequence[SeedGroup], metric: str) -> list[SeedGroup]:
    """Return the groups that have a score, the best mean first."""
    scored = [group for group in groups if group.scores]
    return sorted(scored, key=lambda group: group.mean, reverse=metric.startswith("-"))


def rank_key(sweep: Sweep) -> str | None:
    return next((key for key in RANKS if key in sweep.swept_keys), None)


def rank_of(value: str) -> int | None:
    """Return the number in 8 or r8; None where there is none."""
    digits = value.removeprefix("r")
    return int(digits) if digits.isdecimal() else None


def number_of(value: str) -> float | None:
    """Return the number in 1e-3, 8 or r8; None where there is none."""
    try:
        return float(value.removeprefix("r"))
    except ValueError:
        return None


def best_of_ranks(sweep: Sweep) -> dict[int, SeedGroup]:
    """Return each rank's best group, the smallest rank first: every other key, as the learning rate, tuned for it."""
    key = rank_key(sweep)
    found: dict[int, SeedGroup] = {}
    for group in best_first(groups_of(sweep), sweep.metric):
        rank = rank_of(group.values[key]) if key is not None else None
        if rank is not None:
            found.setdefault(rank, group)
    return dict(sorted(found.items()))


def is_within_noise(group: SeedGroup, best: SeedGroup) -> bool | None:
    """Return whether the means may be equal; None where there are too few seeds to tell."""
    interval = difference_interval(group, best)
    return None if interval is None else interval[0] <= 0 <= interval[1]


def choice_of(sweep: Sweep) -> SeedGroup | None:
    """Return the group to go on with: of the smallest rank within noise of the best one, else the best."""
    ordered = best_first(groups_of(sweep), sweep.metric)
    if not ordered:
        return None
    ranked = best_of_ranks(sweep).values()
    best = ordered[0]
    return next((group for group in ranked if group is best or is_within_noise(group, best)), best)


def sentence(sweep: Sweep) -> str | None:
    """Return what the sweep found, in one sentence with its figures; None before a trial has finished."""
    ordered = best_first(groups_of(sweep), sweep.metric)
    if not ordered:
        return None
    ranks = best_of_ranks(sweep)
    if len(ranks) < 2 or ordered[0] not in ranks.values():  # rank=tapered, which is no number, may be best
        return setting_sentence(sweep, ordered)
    tuned = [key for key in sweep.swept_keys if key not in (*RANKS, SEED)]
    how = f"each at its best {', '.join(key.rpartition('.')[2] for key in tuned)}" if tuned else "none of them tuned"
    if RATE not in tuned:
        how += ", all at one learning rate"
    largest, top = max(ranks), ranks[max(ranks)]
    best_rank = next(rank for rank, group in ranks.items() if group.mean == ordered_mean(ranks, ordered))
    best = ranks[best_rank]
    metric = sweep.metric.removeprefix("-")
    for rank, group in ranks.items():
        reference, name = (top, largest) if best_rank == largest or is_within_noise(best, top) else (best, best_rank)
        if rank >= name:
            break
        interval = difference_interval(group, reference)
        if interval is not None and interval[0] <= 0 <= interval[1]:
            return (
                f"rank {rank} is within noise of rank {name}{share_of_parameters(group, reference)}: {metric} "
                f"{group.mean:.4g} and {reference.mean:.4g}, 95 % of the difference from {interval[0]:.2g} to "
                f"{interval[1]:.2g} over {seeds_of(group, reference)} seeds; {how}"
                + of_those_pruned(sweep, group, reference)
            )
    others = [rank for rank in ranks if rank != best_rank]
    second = min(others, key=lambda rank: ordered.index(ranks[rank]))
    said = f"rank {best_rank} is best: {metric} {best.mean:.4g}, against {ranks[second].mean:.4g} of rank {second}"
    if best.mean == ranks[second].mean:
        said = f"rank {best_rank} is as good as rank {second}: {metric} {best.mean:.4g}"
    interval = difference_interval(best, ranks[second])
    if interval is None:
        counts = seeds_of(best, ranks[second])
        few = "one seed each, so noise is unknown" if counts == "1" else f"over {counts} seeds, too few to know noise"
        return f"{said}; {few}; {how}" + of_those_pruned(sweep, best, ranks[second])
    verdict = "within" if interval[0] <= 0 <= interval[1] else "beyond"
    return (
        f"{said}, {verdict} noise: 95 % of the difference from {interval[0]:.2g} to {interval[1]:.2g} over "
        f"{seeds_of(best, ranks[second])} seeds; {how}"
    ) + of_those_pruned(sweep, best, ranks[second])


def ordered_mean(ranks: Mapping[int, SeedGroup], ordered: Sequence[SeedGroup]) -> float:
    """Return the mean of the best of the ranks' groups, of which `ordered` has the best first."""
    return min(ranks.values(), key=ordered.index).mean


def setting_sentence(sweep: Sweep, ordered: Sequence[SeedGroup]) -> str:
    """Return what is best where no ranks are compared, and what may be as good."""
    best, metric = ordered[0], sweep.metric.removeprefix("-")
    equal = [group.label for group in ordered if group.mean == best.mean]
    good = "is best" if len(equal) == 1 else "are equally good"
    said = f"{' and '.join(equal)} {good}: {metric} {best.mean:.4g}"
    if best.interval is None:
        return f"{said}; one seed, so noise is unknown" + of_those_pruned(sweep, best)
    said += f", 95 % from {best.interval[0]:.4g} to {best.interval[1]:.4g} over {len(best.scores)} seeds"
    near = [group.label for group in ordered[1:] if is_within_noise(group, best)]
    said += f"; within noise of it: {'; '.join(near) or 'none'}"
    if unknown := [group.label for group in ordered[1:] if is_within_noise(group, best) is None]:
        said += f"; of one seed, so not known to be: {'; '.join(unknown)}"
    return said + of_those_pruned(sweep, best)


def of_those_pruned(sweep: Sweep, *groups: SeedGroup) -> str:
    """Say that a mean is of the trials that rungs let on, so better than of all; empty where none was stopped."""
    names = [name for group in groups for name in group.names]
    stopped = [trial for trial in sweep.trials if trial.name in names and trial.state == PAUSED and trial.rung_values]
    if not stopped:
        return ""
    return f"; of these {len(names)} trials rungs stopped {len(stopped)}, so the means are of those that were ahead"


def seeds_of(one: SeedGroup, other: SeedGroup) -> str:
    counts = sorted({len(one.scores), len(other.scores)})
    return " and ".join(map(str, counts))


def share_of_parameters(group: SeedGroup, reference: SeedGroup) -> str:
    """Return words as in " at an eighth of the parameters"; empty where a number is not known."""
    if not group.parameters or not reference.parameters:
        return ""
    share = group.parameters / reference.parameters
    word = next((word for parts, word in SHARES.items() if abs(share * parts - 1) < 0.02), None)
    return f" at {word or f'{100 * share:.3g} %'} of the parameters"


def next_command(sweep: Sweep, folder: str) -> str | None:
    """Return the sweep, or the training, that would tell most now; None before a trial has finished."""
    choice = choice_of(sweep)
    if choice is None:
        return None
    ranks = best_of_ranks(sweep)
    ordered = best_first(groups_of(sweep), sweep.metric)
    kept = list(ranks.values()) if ordered[0] in ranks.values() else [ordered[0], *(ranks.values() or ordered[1:2])]
    # Noise comes first: without it no difference means anything. Seeds that came to no number would do so again.
    if any(len(group.scores) < 2 and len(group.names) < 2 for group in kept):
        words = {key: list(dict.fromkeys(group.values[key] for group in kept)) for key in choice.values}
        return command(sweep, words | {SEED: NEXT_SEEDS}, folder)
    words = {key: [value] for key, value in choice.values.items()}
    for key in (RATE, rank_key(sweep)):
        if key in words and (further := beyond_edge(sweep, key, choice.values[key])):
            del words[key]
            # The group has options for some ranks, the key takes any.
            return command(sweep, words | {RANKS[0] if key in RANKS else key: further, SEED: NEXT_SEEDS}, folder)
    return command(sweep, words, folder)


def beyond_edge(sweep: Sweep, key: str, value: str) -> list[str]:
    """Return the value and two further out where it is the smallest or largest that was tried; nothing inside."""
    is_rank = key in RANKS
    numbers = [number_of(trial.values[key]) for trial in sweep.trials]
    tried, at = sorted({number for number in numbers if number is not None}), number_of(value)
    if at is None or len(tried) < 2 or at not in (tried[0], tried[-1]):
        return []
    step = 2.0 if is_rank else 3.0
    factors = (1 / step**2, 1 / step) if at == tried[0] else (step, step**2)
    further = sorted({at * factor for factor in factors} | {at})
    if not is_rank:
        return [f"{number:.3g}" for number in further]
    whole = [str(int(number)) for number in further if number >= 1]
    return whole if len(whole) > 1 else []


def command(sweep: Sweep, words: Mapping[str, Sequence[str]], folder: str) -> str:
    """Return a command line: submit -m where a key has several values, else train with the values and one seed."""
    is_sweep = any(len(values) > 1 for values in words.values())
    typed = [word for word in sweep.words if not (sweep.rungs and word.startswith("validation.at_steps="))]
    typed = [*typed, *(f"{key}={','.join(values)}" for key, values in words.items())]
    if not is_sweep:
        typed = [word for word in typed if not word.startswith(("cluster.", "cluster="))]
        return shlex.join(["lightning-peft", "train", *typed])
    if sweep.cluster == HYDRA:
        return shlex.join(["lightning-peft", "train", "-m", *typed, f"run_dir={folder}-next"])
    own = [f"sweep_dir={folder}-next"]
    own += ["cluster=local"] if sweep.cluster == "local" else []
    own += [f"sweep.metric={sweep.metric}"] if sweep.metric != "validation_loss" else []
    own += [f"sweep.pruning={sweep.pruning}", f"sweep.reduction={sweep.reduction}"] if sweep.rungs else []
    own += [f"sweep.parallel={sweep.parallel}"] if sweep.parallel else []
    return shlex.join(["lightning-peft", "submit", "-m", *typed, *own])
