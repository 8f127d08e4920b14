"""The trials of a sweep: all combinations, random draws, or what Optuna asks for."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override

JOURNAL = "optuna.log"
STUDY = "sweep"
"""Name of the study that a journal holds."""
MOST_REPEATS = 1000
"""Draws from an interval that were there already, in a row, after which it has no other value."""
TOLD_REPEATS = 10
"""Times that a study asks again for what it has, and is told, until a draw is made for it."""


class Search(Enum):
    """The ways to choose a sweep's trials."""

    grid = "grid"
    """Every combination."""
    random = "random"
    """`sweep.trials` draws."""
    optuna = "optuna"
    """`sweep.trials` draws, each made when it starts, from what the ones before have shown (TPE)."""


class Pruning(Enum):
    """The rules by which trials stop before their last step."""

    none = "none"
    asha = "asha"
    """Asynchronous successive halving: at each rung the best one in `sweep.reduction` goes on."""
    median = "median"
    """Trials go on at each rung that are no worse than the median there."""
    hyperband = "hyperband"
    """Several halvings as asha's side by side, each of which leaves out one rung more: what is slow to get good is
    stopped early by the first of them only (Li et al. 2018, arXiv:1603.06560)."""


class SweepPlace(Enum):
    """The places where the trials of a sweep run."""

    slurm = "slurm"
    """A job array."""
    kubernetes = "kubernetes"
    """The pods of a Job."""
    skypilot = "skypilot"
    """Managed jobs."""
    local = "local"
    """Processes of this machine."""


WITH_TURNS = (SweepPlace.local, SweepPlace.slurm)
"""Places where a trial begins when the sweep says so."""


@dataclass
class SweepConfig:
    """The trials of a sweep and the number that run at once."""

    search: Search = Search.grid
    """grid, random or optuna."""
    trials: int | None = None
    """Number of trials to draw; null for grid."""
    metric: str = "validation_loss"
    """A number of result.json, or of its metrics, that is to be small; with a minus sign before it, large."""
    cluster: SweepPlace = SweepPlace.slurm
    """slurm, kubernetes, skypilot or local; written cluster=local on the command line."""
    seed: int = 0
    """Seed of the draws; the training's is `seed`."""
    pruning: Pruning = Pruning.none
    """none, asha, median or hyperband: stop trials at rungs, where they pause with a checkpoint; with cluster=local or
    slurm."""
    reduction: int = 3
    """Steps between two rungs grow by this factor, and of asha's and hyperband's trials one in so many goes on."""
    min_steps: int | None = None
    """Step of the first rung; null has two rungs before trainer.max_steps."""
    budget_gpu_hours: float | None = None
    """Device hours (of GPUs, else of processes) after which no trial and no rung begins any more, counted over all
    trials; what runs goes on to its next rung or its end. null for no limit; with cluster=local or slurm."""
    parallel: int | None = None
    """Trials at once; null takes one on this machine, and on a cluster as many as it will run."""
    together: Any = None
    """Trials that share one process and one base: a number, or auto for as many as the memory holds; null gives each a
    process."""

    def __post_init__(self) -> None:
        if self.parallel is not None and self.parallel < 1:
            raise ValueError(f"sweep.parallel={self.parallel}: must be at least 1")
        is_count = type(self.together) is int and self.together >= 1
        if self.together not in (None, "auto") and not is_count:
            raise ValueError(f"sweep.together={self.together}: must be a number of at least 1, auto or null")
        if self.together is not None and self.search is Search.optuna:
            raise ValueError(
                f"sweep.together={self.together} sweep.search=optuna: each trial is drawn from what those before have "
                "shown; use grid or random, or leave sweep.together out"
            )
        if self.search is Search.grid and self.trials is not None:
            raise ValueError(f"sweep.trials={self.trials}: a grid has all its combinations; add sweep.search=random")
        if self.search is not Search.grid and (self.trials is None or self.trials < 1):
            raise ValueError(f"sweep.search={self.search.name}: needs sweep.trials, at least 1")
        if self.reduction < 2:
            raise ValueError(f"sweep.reduction={self.reduction}: must be at least 2")
        if self.seed < 0:
            raise ValueError(f"sweep.seed={self.seed}: must be 0 or more")
        if self.min_steps is not None and self.min_steps < 1:
            raise ValueError(f"sweep.min_steps={self.min_steps}: must be at least 1, or null")
        if self.pruning is not Pruning.none and self.cluster not in WITH_TURNS:
            raise ValueError(
                f"sweep.pruning={self.pruning.name} cluster={self.cluster.name}: trials are paused and promoted with "
                "cluster=local or slurm; other clusters run each trial to its end"
            )
        if self.budget_gpu_hours is not None and not self.budget_gpu_hours > 0:
            raise ValueError(f"sweep.budget_gpu_hours={self.budget_gpu_hours}: must be above 0, or null")
        if self.budget_gpu_hours is not None and self.cluster not in WITH_TURNS:
            raise ValueError(
                f"sweep.budget_gpu_hours={self.budget_gpu_hours:g} cluster={self.cluster.name}: is kept with "
                "cluster=local or slurm; the tasks of other clusters begin by themselves"
            )
        if not self.metric.removeprefix("-"):
            raise ValueError(f"sweep.metric={self.metric!r}: name a number of result.json")


@dataclass(frozen=True)
class Dimension:
    """The values that one swept key may take."""

    key: str
    choices: list[str]
    """Values as typed; empty for an interval."""
    low: float = 0.0
    high: float = 0.0
    is_log: bool = False
    is_int: bool = False

    @property
    def size(self) -> float:
        """Return the number of values; infinite for an interval of fractions."""
        if self.choices:
            return len({*self.choices})
        return self.high - self.low + 1 if self.is_int else math.inf

    def draw(self, generator: random.Random) -> str:
        if self.choices:
            return generator.choice(self.choices)
        # Each whole number has the unit around it.
        low, high = (self.low - 0.5, self.high + 0.5) if self.is_int else (self.low, self.high)
        if self.is_log:
            low, high = math.log(low), math.log(high)
        drawn = generator.uniform(low, high)
        return self.text(math.exp(drawn) if self.is_log else drawn)

    def text(self, value: float) -> str:
        """Return a number of the interval as it is typed: a whole one, or with as many digits as tell values apart.

        Six digits are finer than any effect and keep folder names short; a narrow interval far from zero takes more.
        """
        value = min(max(value, self.low), self.high)
        if self.is_int:
            return str(round(value))
        narrow = max(1.0, max(abs(self.low), abs(self.high)) / (self.high - self.low))
        return f"{value:.{min(17, 6 + math.floor(math.log10(narrow)))}g}"

    def value(self, text: str) -> str | int | float:
        """Return what Optuna knows a typed value by."""
        if self.choices:
            return text
        return int(text) if self.is_int else min(max(float(text), self.low), self.high)


def combinations(dimensions: Sequence[Dimension]) -> float:
    """Return how many different trials there are; infinite where a fraction is drawn."""
    return math.prod(dimension.size for dimension in dimensions)


def dimension(override: Override) -> Dimension:
    """Return the dimension of one swept word, in Hydra's grammar. Raises ValueError for an interval without draws."""
    key = override.get_key_element()
    sweep = override.value()
    if not isinstance(sweep, IntervalSweep):
        return Dimension(key, typed_choices(override))
    low, high = sweep.start, sweep.end
    assert low is not None and high is not None
    is_log = "log" in sweep.tags
    if low >= high or (is_log and low <= 0):
        raise ValueError(f"{override.input_line}: an interval goes from a smaller to a larger number, above 0 if log")
    return Dimension(key, [], low, high, is_log, isinstance(low, int) and isinstance(high, int))


def choices(override: Override) -> list[str]:
    """Return the values of a swept word. Raises ValueError where it has none."""
    try:
        values = list(override.sweep_string_iterator())
    except ValueError as error:  # Python raises it for range(0,2,0)
        raise ValueError(f"{override.input_line}: {error}") from error
    if not values:
        raise ValueError(f"{override.input_line}: holds no value, so there is nothing to train")
    return values


def typed_choices(override: Override) -> list[str]:
    """Return the values of a swept word, numbers as they were typed: Hydra writes 1e30 as 1e+30."""
    values = choices(override)
    text = (override.input_line or "").partition("=")[2]
    texts = text.removeprefix("choice(").removesuffix(")").split(",")
    if len(texts) != len(values):
        return values
    return [
        typed.strip() if is_same_number(typed, value) else value for typed, value in zip(texts, values, strict=True)
    ]


def is_same_number(one: str, other: str) -> bool:
    try:
        return float(one) == float(other)
    except ValueError:
        return False


def random_trials(dimensions: Sequence[Dimension], count: int, seed: int) -> list[list[str]]:
    """Return `count` draws, different from one another; fewer where there are no more."""
    generator = random.Random(seed)
    wanted, endless = min(count, combinations(dimensions)), combinations(dimensions) == math.inf
    drawn: dict[tuple[str, ...], None] = {}
    repeats = 0
    # Each value of a finite set comes up in the end; an interval as narrow as two neighbouring floats has no third.
    while len(drawn) < wanted and not (endless and repeats == MOST_REPEATS):
        words = tuple(f"{d.key}={d.draw(generator)}" for d in dimensions)
        repeats = repeats + 1 if words in drawn else 0
        drawn[words] = None
    return [list(words) for words in drawn]


class OptunaStudy:
    """A study in a journal file of the sweep's folder, asked and told by one process at a time."""

    def __init__(self, folder: Path, dimensions: list[Dimension], seed: int):
        optuna = import_optuna()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        backend = optuna.storages.journal.JournalFileBackend(str(folder / JOURNAL))
        self.optuna = optuna
        storage = optuna.storages.JournalStorage(backend)
        # A folder may be moved, so its name is none of the study's.
        known = optuna.get_all_study_names(storage)
        self.study = optuna.create_study(storage=storage, study_name=known[0] if known else STUDY, load_if_exists=True)
        # Each process draws with its own seed, else all would draw the same start.
        drawn = len(self.study.trials)
        self.study.sampler = optuna.samplers.TPESampler(seed=seed + drawn, constant_liar=True)
        self.dimensions = dimensions
        self.seed = seed

    def ask(self, drawn: Mapping[tuple[str, ...], float | None]) -> tuple[int, list[str]]:
        """Return (number, overrides) of the next trial, whose overrides are none of `drawn`.

        `drawn` has the score of each trial that was drawn, None without one. A study that asks for one of them again is
        told that, and where it keeps asking, a random draw is made for it. Raises ValueError where none is left.
        """
        distributions = {d.key: self.distribution(d) for d in self.dimensions}
        for _ in range(TOLD_REPEATS):
            trial = self.study.ask(distributions)
            overrides = [f"{d.key}={self.text(d, trial.params[d.key])}" for d in self.dimensions]
            if tuple(overrides) not in drawn:
                return trial.number, overrides
            self.tell({trial.number: drawn[tuple(overrides)]})
        # One draw more than there are trials has at least one that is new.
        draws = random_trials(self.dimensions, len(drawn) + 1, self.seed)
        if (left := next((draw for draw in draws if tuple(draw) not in drawn), None)) is None:
            raise ValueError(f"sweep.search=optuna: all {len(drawn)} combinations of the swept values are drawn")
        texts = [word.partition("=")[2] for word in left]
        self.study.enqueue_trial({d.key: d.value(text) for d, text in zip(self.dimensions, texts, strict=True)})
        return self.study.ask(distributions).number, left

    def tell(self, values: Mapping[int, float | None], pruned: Mapping[int, Mapping[int, float]] | None = None) -> None:
        """Tell the study the score (smaller is better) by number of each ended trial, None without one; once only.

        `pruned` has what the trials that were stopped reached, step to score.
        """
        running = {
            trial.number: trial._trial_id
            for trial in self.study.trials
            if trial.state == self.optuna.trial.TrialState.RUNNING
        }
        for trial, reached in (pruned or {}).items():
            if trial in running:
                for step, score in reached.items():
                    self.study._storage.set_trial_intermediate_value(running[trial], step, score)
                self.study.tell(trial, state=self.optuna.trial.TrialState.PRUNED)
                del running[trial]
        for trial, value in values.items():
            if trial in running:
                state = None if value is not None and math.isfinite(value) else self.optuna.trial.TrialState.FAIL
                self.study.tell(trial, value if state is None else None, state=state)

    def distribution(self, dimension: Dimension) -> Any:
        distributions = self.optuna.distributions
        if dimension.choices:
            return distributions.CategoricalDistribution(dimension.choices)
        if dimension.is_int:
            return distributions.IntDistribution(int(dimension.low), int(dimension.high), log=dimension.is_log)
        return distributions.FloatDistribution(dimension.low, dimension.high, log=dimension.is_log)

    @staticmethod
    def text(dimension: Dimension, value: Any) -> str:
        return str(value) if dimension.choices else dimension.text(value)


def import_optuna() -> Any:
    try:
        # This is an optional extra.
        import optuna
    except ImportError as error:
        raise ValueError("sweep.search=optuna: not installed; pip install 'lightning-peft[optuna]'") from error
    return optuna
