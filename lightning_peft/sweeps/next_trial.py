"""The next trial of a sweep whose trials are begun one by one: by workers of this machine, or by slots.

A slot is a task of a job array that asks the sweep for one trial after the other. A trial that its job is working on
has the task's id as `Trial.job`.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from lightning_peft.cluster.job import SAVED, Job
from lightning_peft.cluster.process import LEAVE
from lightning_peft.sweeps.budget import budget_in_words, is_over_budget
from lightning_peft.sweeps.pruning import begin_at_rung, preempted, promoted, target
from lightning_peft.sweeps.sweep import (
    DIVERGED,
    FAILED,
    FINISHED,
    PAUSED,
    PREEMPTED,
    RUNNING,
    Sweep,
    Trial,
    drop_result,
    read_result,
    refresh,
)

logger = logging.getLogger(__name__)

OVER = (FINISHED, PAUSED, FAILED, DIVERGED)
"""Statuses of a start that is not to be gone on with by the job that made it."""


def next_trial(sweep: Sweep, beside: Sequence[Trial]) -> Trial | None:
    """Return the trial to begin next: one that was preempted, one that a rung lets on, or one that nobody has begun.

    With some claimed already, it is one that can train beside them.
    """
    trial = preempted(sweep) or promoted(sweep) if sweep.rungs else None
    if not beside:
        return trial or next((trial for trial in sweep.trials if trial.is_waiting), None)
    base = beside[0].base
    if base is None:
        return None
    if trial is not None and trial.base == base:
        return trial
    return next((trial for trial in sweep.trials if trial.is_waiting and trial.base == base), None)


def claim_next(sweep: Sweep, folder: Path) -> list[Trial]:
    """Begin the next trial, or as many as train together and share a base; none where the budget is spent."""
    claimed: list[Trial] = []
    if is_over_budget(sweep, folder):
        logger.info("%s", budget_in_words(sweep, folder, str(folder)))
        sweep.is_spent = True
        return []
    while len(claimed) < sweep.together and (trial := next_trial(sweep, claimed)) is not None:
        begin_at_rung(sweep, trial, folder)
        trial.state = RUNNING
        claimed.append(trial)
    return claimed


def work_to_begin(sweep: Sweep) -> int:
    """Return how many workers or slots have something to do at once."""
    work = sum(trial.is_waiting for trial in sweep.trials) + sweep.count - len(sweep.trials)
    return work + (bool(sweep.rungs) and (preempted(sweep) or promoted(sweep)) is not None)


def turn_of_slot(
    sweep: Sweep,
    folder: Path,
    task: str,
    ended: int | None,
    queue: Mapping[str, Job],
    names: Collection[str] = (),
) -> list[Trial]:
    """Return the trials that a slot is to run now: those it was interrupted in, else the next; none for it to leave.

    `ended` is the exit status of what the slot has run in this start of its job, None where it begins, and `names` the
    trials it is of; a slot that got no answer asks again, and by then the sweep may have given it others.
    """
    own = [trial for trial in sweep.trials if trial.job == task]
    ends = {trial.name: ended if not names or trial.name in names else None for trial in own}
    kept = [trial for trial in own if not is_over(sweep, trial, folder, ends[trial.name])]
    if kept:
        for trial in kept:
            drop_result(trial, folder)
        refresh(sweep, folder, queue)
        return kept
    for trial in own:
        trial.job = None
        if (status := ends[trial.name]) is not None:
            trial.exit_code = status
            leave_to_retry(trial, folder)
    refresh(sweep, folder, queue)
    claimed = claim_next(sweep, folder)
    for trial in claimed:
        trial.job = task
    return claimed


def leave_to_retry(trial: Trial, folder: Path) -> None:
    """Have nobody take up a trial whose slot gave it up, as it was told to leave again and again."""
    result = read_result(folder / trial.name)
    if result is not None and result["status"] == PREEMPTED:
        trial.resumed_at = int(result["steps"])


def is_over(sweep: Sweep, trial: Trial, folder: Path, ended: int | None) -> bool:
    """Return whether a trial is not to be gone on with by the slot that began it, whose last start ended so."""
    result = read_result(folder / trial.name)
    if trial.is_cancelled or (folder / trial.name / LEAVE).exists():
        return True
    if result is not None and result["status"] == PAUSED and result["steps"] != target(sweep, trial):
        # trainer.max_time paused it, which the next start has anew; one that gets no further is left to `sweep retry`.
        known, trial.resumed_at = trial.resumed_at or 0, int(result["steps"])
        return trial.resumed_at <= known
    if result is None:
        # A slot does not say 75 of one that left no result, unless the sweep has dropped that, and its answer was lost.
        return ended not in (None, SAVED)
    return ended is not None or result["status"] in OVER
