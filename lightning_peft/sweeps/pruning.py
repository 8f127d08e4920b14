"""The trials of a pruned sweep that go on: rungs are steps at which each trial validates, saves and pauses.

A trial that stops at a rung is paused, not ended: its schedule spans the whole run, and once it is promoted it goes on
from its checkpoint as if it had never stopped.
"""

import random
import statistics
from collections import Counter
from collections.abc import Sequence
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
    """Return the steps where trials pause: from `min_steps`, each `reduction` times the one before, below `max_steps`.

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


def brackets(count: int, rungs: int, reduction: int, seed: int) -> list[int]:
    """Return for each of `count` trials how many of the first rungs it does not pause at, from 0 to `rungs`.

    Bracket b has s = rungs - b halvings, and of the trials a share of reduction^s / (s + 1): each bracket then takes
    about as many steps as another (Li et al. 2018, algorithm 1). Trials are drawn for the brackets.
    """
    halvings = range(rungs, -1, -1)
    weights = [reduction**s / (s + 1) for s in halvings]
    exact = [count * weight / sum(weights) for weight in weights]
    sizes = [int(size) for size in exact]
    for b in sorted(range(rungs + 1), key=lambda b: sizes[b] - exact[b])[: count - sum(sizes)]:
        sizes[b] += 1
    found = [b for b, size in enumerate(sizes) for _ in range(size)]
    random.Random(seed).shuffle(found)
    return found


def enter_brackets(sweep: Sweep, trials: Sequence[Trial]) -> None:
    """Give new trials of the sweep the bracket of their place where hyperband prunes."""
    if sweep.pruning == Pruning.hyperband.name:
        found = brackets(sweep.count, len(sweep.rungs), sweep.reduction, sweep.seed)
        for trial in trials:
            trial.bracket = found[sweep.trials.index(trial)]


def target(sweep: Sweep, trial: Trial) -> int | None:
    """Return the step at which the trial's next start pauses; None for one that runs to the end."""
    passed = trial.bracket + len(trial.rung_values)
    return sweep.rungs[passed] if passed < len(sweep.rungs) else None


def may_go_on(sweep: Sweep, trial: Trial) -> bool:
    """Return whether a trial that is paused at a rung is among those that the rule lets on."""
    values = [t.rung_values[len(trial.rung_values) - 1] for t in sweep.trials if has_passed(t, trial)]
    known = sorted(value for value in values if value is not None)
    value = trial.rung_values[-1]
    if value is None:
        return False
    if sweep.pruning == Pruning.median.name:
        return len(known) < WARM_UP or value <= statistics.median(known)
    # Among equal values those that stand first in the sweep go on, so that no more than the share does.
    share = len(known) // sweep.reduction
    rank = sum(other < value for other in known)
    before = [t for t in sweep.trials[: sweep.trials.index(trial)] if has_passed(t, trial)]
    rank += sum(t.rung_values[len(trial.rung_values) - 1] == value for t in before)
    return rank < share


def has_passed(other: Trial, trial: Trial) -> bool:
    """Return whether another trial of the same bracket has a value at the rung at which `trial` is paused."""
    return other.bracket == trial.bracket and len(other.rung_values) >= len(trial.rung_values)


def paused_at_rung(sweep: Sweep) -> list[Trial]:
    """Return the trials that stopped at a rung, the furthest first, and of those the best."""
    paused = [trial for trial in sweep.trials if trial.state == PAUSED and trial.rung_values]
    return sorted(
        paused, key=lambda t: (-t.bracket - len(t.rung_values), t.rung_values[-1] is None, t.rung_values[-1] or 0.0)
    )


def promoted(sweep: Sweep) -> Trial | None:
    """Return the trial to go on with, the furthest first; None where the rule lets none on.

    When nothing runs or waits and none has reached the end, the best of the furthest does: a sweep has a winner, and
    each of its brackets.
    """
    paused = paused_at_rung(sweep)
    found = next((trial for trial in paused if may_go_on(sweep, trial)), None)
    if found is not None or not paused or len(sweep.trials) < sweep.count:
        return found
    # A bracket that has one at the end, or may yet have one, needs no other.
    settled = {
        trial.bracket for trial in sweep.trials if trial.state in (RUNNING, WAITING, FINISHED) or trial.is_waiting
    }
    return next((trial for trial in paused if trial.bracket not in settled), None)


def preempted(sweep: Sweep) -> Trial | None:
    """Return the first trial that was told to leave on its way to a rung, to be gone on with at once; None without one.

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
    """Return words as in "rungs: 9 trials reached step 4, 3 reached step 12, 1 reached the end"."""
    reached = [
        f"{sum(t.bracket <= number < t.bracket + len(t.rung_values) for t in sweep.trials)} reached step {step}"
        for number, step in enumerate(sweep.rungs)
    ]
    ended = sum(trial.state == FINISHED for trial in sweep.trials)
    said = f"rungs ({sweep.pruning}): {', '.join(reached)}, {ended} reached the end"
    if sweep.pruning == Pruning.hyperband.name:
        sizes = Counter(trial.bracket for trial in sweep.trials)
        firsts = [*(f"step {step}" for step in sweep.rungs), "the end"]
        said += "; first looked at: " + ", ".join(f"{sizes[b]} at {first}" for b, first in enumerate(firsts))
    return said
