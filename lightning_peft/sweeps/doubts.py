"""Doubts for whoever believes a sweep's table: what its trials do not have in common, or did not come to."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from lightning_peft.free_options import FREE_TO_CHANGE, NOT_COMPARED
from lightning_peft.sweeps.statistics import SEED, SeedGroup, best_first, groups_of
from lightning_peft.sweeps.sweep import CANCELLED, DIVERGED, FAILED, FINISHED, LOST, Sweep, Trial, score

MOST_NAMES = 3
"""Trials that a line names; of more it says how many."""
OTHER_ROWS = (
    "model", "objective", "data", "data.source", "data.train_path", "data.validation_path", "data.hub_name",
    "data.hub_config", "data.hub_split", "data.hub_validation_split", "data.rows", "data.task", "data.format",
    "data.max_rows", "data.validation_fraction", "data.max_validation_rows", "data.split_seed", "data.max_length",
    "data.on_too_long", "data.on_bad_row", "data.system_prompt", "data.prompt_template", "data.layout",
    "data.template_options", "data.reasoning", "data.train_on", "data.train_on_last_turn", "data.sources",
    "data.chosen_column", "data.rejected_column", "data.label_column", "data.prompt_column", "data.completion_column",
    "data.text_column", "data.messages_column", "data.system_column", "data.history_column", "data.input_column",
    "data.tools_column", "data.reasoning_column", "model.name", "model.path", "model.revision", "model.new_tokens",
    "model.random_weights", "model.rope_scaling",
)  # fmt: skip
"""Keys that change which tokens a validation looks at, or what it computes."""
LENGTH = ("trainer.max_steps", "trainer.max_epochs", "trainer.accumulate_grad_batches", "trainer.devices",
          "data.micro_batch_size", "data.max_length", "data.max_rows", "data.train_path", "data.packing")  # fmt: skip
"""Keys that change how many steps a run has."""
CONTENT = ("training rows", "validation rows", "base weights")
"""Contents that a result has fingerprints of, which the trials of a sweep have in common."""
HOLD_CONTENT = ("model", "data", "objective", "recipe")
"""Groups whose options may change them."""
GONE = (DIVERGED, FAILED, LOST, CANCELLED)
COVERAGE = {2: "half of all cases", 3: "two cases of three", 4: "four cases of five", 5: "four cases of five"}
"""Share for which the middle 95 % of resampled means of so few normal scores hold the true mean; 95 % from 30 on."""


def doubts(sweep: Sweep) -> list[str]:
    """Return a line for each doubt; empty where the finished trials can be compared as they stand."""
    finished = [trial for trial in sweep.trials if score(sweep, trial) is not None]
    if not finished:
        ended = [trial for trial in sweep.trials if trial.state == FINISHED]
        metric = sweep.metric.removeprefix("-")
        return [f"no trial has a finite {metric}, {len(ended)} of {len(sweep.trials)} have finished"] if ended else []
    groups = best_first(groups_of(sweep), sweep.metric)
    return [line for find in FINDERS for line in find(sweep, finished, groups)]


def ties(sweep: Sweep, finished: Sequence[Trial], groups: Sequence[SeedGroup]) -> list[str]:
    """Name the trials that are as good as the best one."""
    best = min(score(sweep, trial) for trial in finished)  # type: ignore[type-var]
    equal = [trial for trial in finished if score(sweep, trial) == best]
    return [f"equally good: {named(equal)}"] if len(equal) > 1 else []


def repeats(sweep: Sweep, finished: Sequence[Trial], groups: Sequence[SeedGroup]) -> list[str]:
    """Name the trials of the same values and the same seed."""
    same: dict[tuple[str, ...], list[Trial]] = {}
    for trial in finished:
        same.setdefault(tuple(sorted(f"{key}={value}" for key, value in trial.values.items())), []).append(trial)
    return [f"trained with the same values and seed, counted once: {named(t)}" for t in same.values() if len(t) > 1]


def survivors(sweep: Sweep, finished: Sequence[Trial], groups: Sequence[SeedGroup]) -> list[str]:
    """Name the groups whose mean is of fewer seeds than were trained, the best first."""
    if SEED not in sweep.swept_keys:
        return []
    trials = {trial.name: trial for trial in sweep.trials}
    lines = []
    for group in groups:
        gone = Counter(trials[name].state for name in group.names if trials[name].state in GONE)
        if gone:
            lost = " and ".join(f"{count} {state}" for state, count in gone.items())
            lines.append(f"{group.label}: its mean is of {len(group.scores)} of {len(group.names)} seeds; {lost}")
    more = len(lines) - MOST_NAMES
    return lines[:MOST_NAMES] + ([f"the means of {more} more settings are of some of their seeds"] if more > 0 else [])


def lengths(sweep: Sweep, finished: Sequence[Trial], groups: Sequence[SeedGroup]) -> list[str]:
    """Name the trials that stopped early, and those of another length than the others."""
    early = [trial for trial in finished if result_of(trial, "stopped_early")]
    steps = Counter(result_of(trial, "steps") for trial in finished if trial not in early)
    lines = []
    if early:
        took = sorted({result_of(trial, "steps") for trial in early})
        lines.append(f"stopped early, at step {', '.join(map(str, took))}: {named(early)}")
    if len(steps) > 1 and not any(key in LENGTH or is_below(key, OTHER_ROWS) for key in sweep.swept_keys):
        ((common, _),) = steps.most_common(1)
        others = [trial for trial in finished if trial not in early and result_of(trial, "steps") != common]
        lines.append(f"trained for another number of steps than the others' {common}: {named(others)}")
    return lines


def words_apart(sweep: Sweep, finished: Sequence[Trial], groups: Sequence[SeedGroup]) -> list[str]:
    """Name the trials that were started with words that the others do not have."""
    by_words: dict[tuple[str, ...], list[Trial]] = {}
    for trial in finished:
        words = [word for word in trial.other_words if changes_numbers(word.removeprefix("without ").partition("=")[0])]
        if words:
            by_words.setdefault(tuple(words), []).append(trial)
    if [len(trials) for trials in by_words.values()] == [len(finished)]:
        return []
    return [f"trained with other words ({', '.join(words)}): {named(trials)}" for words, trials in by_words.items()]


def changed_by_guard(sweep: Sweep, finished: Sequence[Trial], groups: Sequence[SeedGroup]) -> list[str]:
    """Name the trials that trained at another rate than they name, or left steps out."""
    slower = [trial for trial in finished if result_of(trial, "rollbacks")]
    skipped = [trial for trial in finished if result_of(trial, "steps_left_out")]
    lines = []
    if slower:
        factors = sorted({f"{result_of(trial, 'lr_factor'):.3g}" for trial in slower})
        lines.append(f"diverged, and went on at {', '.join(factors)} times the learning rate: {named(slower)}")
    if skipped:
        lines.append(f"left steps out that were not finite: {named(skipped)}")
    return lines


def other_losses(sweep: Sweep, finished: Sequence[Trial], groups: Sequence[SeedGroup]) -> list[str]:
    """Name the keys that make losses of other things, and a loss that is of a few rows."""
    metric = sweep.metric.removeprefix("-")
    lines = []
    keys = [key for key in sweep.swept_keys if is_below(key, OTHER_ROWS)]
    if keys and "loss" in metric:
        lines.append(f"{metric} of trials that differ in {', '.join(keys)} may be of other rows, or of other tokens")
    if metric == "train_loss":
        lines.append("train_loss is of the rows of the last step alone: differences may be of these rows")
    return lines


def other_content(sweep: Sweep, finished: Sequence[Trial], groups: Sequence[SeedGroup]) -> list[str]:
    """Name the trials of other rows or another base than the others, which no swept key asks for."""
    if any(key.partition(".")[0] in HOLD_CONTENT for key in sweep.swept_keys):
        return []
    lines = []
    for what in CONTENT:
        known = {t.name: found for t in finished if (found := (result_of(t, "content") or {}).get(what))}
        if len({*known.values()}) < 2:
            continue
        ((common, _),) = Counter(known.values()).most_common(1)
        others = [trial for trial in finished if known.get(trial.name, common) != common]
        lines.append(f"{what} are not those of the other trials, as if edited between two starts: {named(others)}")
    return lines


def few_seeds(sweep: Sweep, finished: Sequence[Trial], groups: Sequence[SeedGroup]) -> list[str]:
    """Name the intervals that claim more than so few scores can tell."""
    counts = [len(group.scores) for group in groups if len(group.scores) > 1]
    fewest = min(counts, default=0)
    if fewest not in COVERAGE:
        return []
    return [f"intervals over {fewest} seeds are too narrow: they hold the true mean in {COVERAGE[fewest]}, not in 95 %"]


FINDERS: tuple[Callable[[Sweep, Sequence[Trial], Sequence[SeedGroup]], list[str]], ...] = (
    ties, repeats, survivors, lengths, words_apart, changed_by_guard, other_losses, other_content, few_seeds,
)  # fmt: skip


def changes_numbers(key: str) -> bool:
    """Return whether an option may change what a run's numbers are, while trials have different values of it.

    The number of steps does: a run that goes on may change it, and is then longer than the others.
    """
    return key in LENGTH or not (
        key in FREE_TO_CHANGE or key.partition(".")[0] in (*{*NOT_COMPARED} - {"method"}, "sweep")
    )


def is_below(key: str, keys: Sequence[str]) -> bool:
    """Return whether a swept key is one of these, or an option of one whose options all count."""
    below = ("objective", "data.sources", "data.template_options", "model.rope_scaling")
    return key in keys or any(key.startswith(f"{other}.") for other in below if other in keys)


def result_of(trial: Trial, name: str) -> Any:
    return (trial.result or {}).get(name)


def named(trials: Sequence[Trial]) -> str:
    names = [trial.name for trial in trials]
    if len(names) <= MOST_NAMES:
        return ", ".join(names)
    return f"{', '.join(names[:MOST_NAMES])} and {len(names) - MOST_NAMES} more"
