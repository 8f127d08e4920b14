"""Which trials of a pruned sweep go on: rungs are steps at which each trial validates, saves and pauses.

A trial that stops at a rung is paused, not ended: its schedule spans the whole run, and once it is promoted it goes on
from its checkpoint as if it had never stopped.
"""

import statistics
from pathlib import Path

from omegaconf import OmegaConf

from lightning_peft.checkpoint.atomic import atomic_file
from lightning_peft.sweeps.search import Pruning
from lightning_peft.sweeps.sweep import FINISHED, PAUSED, PREEMPTED, RUNNING, WAITING, Sweep, Trial, begin

RUNG_OPTION = "validation.at_steps"
"""The option of `train` that has every trial validated at the rungs, also one that does not pause there."""
WARM_UP = 4
"""Values at a rung before the median rule stops a trial there."""


def rung_steps(max_steps: int, reduction: int, min_steps: int | None) -> list[int]:
    """Steps at which trials pause: from `min_steps`, each `reduction` times the one before, below `max_steps`.

    Without `min_steps` two of them come before the end. Raises ValueError where none does.
    """
    step = float(min_steps or max(1, round(max_steps / reduction**2)))
    if step >= max_steps:
        raise ValueError(f"sweep.min_steps={min_steps} trainer.max_steps={max_steps}: the first rung is before the end")
    steps: list[int] = []
    while step < max_steps:
        steps.append(round(step))
        step *= reduction
    return steps


def target(sweep: Sweep, trial: Trial) -> int | None:
    """The step at which the trial's next start pauses; None for one that runs to the end."""
    passed = len(trial.rung_values)
    return sweep.rungs[passed] if passed < len(sweep.rungs) else None


def may_go_on(sweep: Sweep, trial: Trial) -> bool:
    """Whether a trial that is paused at a rung is among those that the rule lets on."""
    values = [t.rung_values[len(trial.rung_values) - 1] for t in sweep.trials if has_passed(t, trial)]
    known = sorted(value for value in values if value is not None)
    value = trial.rung_values[-1]
    if value is None:
        return False
    if sweep.pruning == Pruning.median.name:
        return len(known) < WARM_UP or value <= statistics.median(known)
    # Of equal values those that stand first in the sweep go on, so that no more than the share does.
    share = len(known) // sweep.reduction
    rank = sum(other < value for other in known)
    before = [t for t in sweep.trials[: sweep.trials.index(trial)] if has_passed(t, trial)]
    rank += sum(t.rung_values[len(trial.rung_values) - 1] == value for t in before)
    return rank < share


def has_passed(other: Trial, trial: Trial) -> bool:
    """Whether another trial has a value at the rung at which `trial` is paused."""
    return len(other.rung_values) >= len(trial.rung_values)


def paused_at_rung(sweep: Sweep) -> list[Trial]:
    """The trials that stopped at a rung, the furthest first, and of those the best."""
    paused = [trial for trial in sweep.trials if trial.state == PAUSED and trial.rung_values]
    return sorted(paused, key=lambda t: (-len(t.rung_values), t.rung_values[-1] is None, t.rung_values[-1] or 0.0))


def promoted(sweep: Sweep) -> Trial | None:
    """The trial to go on with, the furthest first; None where the rule lets none on.

    When nothing runs or waits and none has reached the end, the best of the furthest does: a sweep has a winner.
    """
    paused = paused_at_rung(sweep)
    found = next((trial for trial in paused if may_go_on(sweep, trial)), None)
    if found is not None or not paused or len(sweep.trials) < sweep.count:
        return found
    is_over = not any(trial.state in (RUNNING, WAITING) or trial.is_waiting for trial in sweep.trials)
    has_winner = any(trial.state == FINISHED for trial in sweep.trials)
    return paused[0] if is_over and not has_winner else None


def preempted(sweep: Sweep) -> Trial | None:
    """The first trial that was told to leave on its way to a rung, to be gone on with at once; None without one.

    One that has come no further since it was last taken up is left to `sweep retry`.
    """
    left = [trial for trial in sweep.trials if trial.state == PREEMPTED and trial.result is not None]
    return next((trial for trial in left if int(trial.result["steps"]) > (trial.resumed_at or 0)), None)  # type: ignore[index]


def begin_at_rung(sweep: Sweep, trial: Trial, folder: Path) -> None:
    """Count an attempt that ends at the trial's next rung, which its config.yaml says."""
    if sweep.rungs and trial.state == PREEMPTED and trial.result is not None:
        trial.resumed_at = int(trial.result["steps"])
    begin(trial, folder)
    if not sweep.rungs:
        return
    path = folder / trial.name / "config.yaml"
    config = OmegaConf.load(path)
    config.pause_at = target(sweep, trial)
    with atomic_file(path) as partial:
        OmegaConf.save(config, partial)


def rungs_in_words(sweep: Sweep) -> str:
    """As in "rungs: 9 trials reached step 4, 3 reached step 12, 1 reached the end"."""
    reached = [
        f"{sum(len(trial.rung_values) > number for trial in sweep.trials)} reached step {step}"
        for number, step in enumerate(sweep.rungs)
    ]
    ended = sum(trial.state == FINISHED for trial in sweep.trials)
    return f"rungs ({sweep.pruning}): {', '.join(reached)}, {ended} reached the end"
