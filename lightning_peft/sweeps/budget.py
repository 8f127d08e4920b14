"""The device hours that the trials of a sweep have taken, by what their folders say, and whether more may begin."""

import csv
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lightning_peft.sweeps.sweep import PAUSED, Sweep, Trial, hours_of
from lightning_peft.tracking.cells import number_of


def spent_hours(sweep: Sweep, folder: Path) -> float:
    """Return the hours of all devices of all trials, of those that run now up to their last logged step."""
    return sum(hours_of_trial(sweep, trial, folder / trial.name) for trial in sweep.trials)


def hours_of_trial(sweep: Sweep, trial: Trial, run_dir: Path) -> float:
    """Return what a trial has taken over all its attempts.

    The starts that ended say it in `result.json`; of one that runs, or was killed, the steps of all attempts do.
    """
    known = trial.spent_hours + hours_of(trial.result)
    return known if trial.result is not None else max(known, logged_hours(sweep, trial, run_dir))


def logged_hours(sweep: Sweep, trial: Trial, run_dir: Path) -> float:
    """Return the hours of the steps in `metrics.csv`, on the devices that `config.yaml` names."""
    try:
        with (run_dir / "metrics.csv").open(encoding="utf-8", errors="replace") as file:
            # The last row of a run that is writing it may be there in part.
            seconds = sum(number_of(row.get("step_seconds")) or 0.0 for row in csv.DictReader(file))
        trainer: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml"))["trainer"]  # type: ignore[index, call-overload, assignment]
    except FileNotFoundError:
        return 0.0
    devices = 1
    for key in ("devices", "num_nodes"):
        devices *= value if isinstance(value := trainer.get(key), int) and value > 0 else 1
    return seconds * devices / 3600 / (sweep.together if trial.base is not None else 1)


def is_over_budget(sweep: Sweep, folder: Path) -> bool:
    """Return whether no trial and no rung may begin any more."""
    return sweep.budget_gpu_hours is not None and spent_hours(sweep, folder) >= sweep.budget_gpu_hours


def budget_in_words(sweep: Sweep, folder: Path, shown: str) -> str:
    """Say it as in "budget: 4.1 of 4 device hours; spent, so 3 trials are not begun and 2 stay at a rung; ..."."""
    assert sweep.budget_gpu_hours is not None
    said = f"budget: {spent_hours(sweep, folder):.3g} of {sweep.budget_gpu_hours:g} device hours"
    if not is_over_budget(sweep, folder):
        return said
    waiting = sum(trial.is_waiting for trial in sweep.trials) + sweep.count - len(sweep.trials)
    stay = sum(trial.state == PAUSED and bool(trial.rung_values) for trial in sweep.trials)
    return (
        f"{said}; spent, so {waiting} trials are not begun and {stay} stay at a rung; lightning-peft sweep retry "
        f"{shown} sweep.budget_gpu_hours=MORE goes on"
    )
