"""A sweep's trials as the tasks of one SLURM job array."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lightning_peft.cluster.slurm import (
    ARRAY_TRAIN_WORDS,
    ONE_RUN,
    TOGETHER,
    TOGETHER_TRAIN_WORDS,
    ClusterConfig,
    array_run_dir,
    batch_script,
    log_path,
    submit_script,
)
from lightning_peft.config import TrainConfig
from lightning_peft.sweeps.sweep import Sweep, Trial, begin, changed_sweep


def submit_array(folder: Path, names: list[str], cluster: ClusterConfig, run: TrainConfig) -> None:
    """Submit these trials, or with no names as many tasks as Optuna has trials to draw. Prints the job's number."""
    with changed_sweep(folder) as sweep:
        groups = groups_of_tasks([sweep.trial(name) for name in names], sweep.together)
        tasks = len(groups) or sweep.count - len(sweep.trials)
        run_dirs = list_path(sweep, folder)
        places = [folder / name for name in names]
        if sweep.together > 1:
            places = [run_dirs.with_suffix("") / str(task) for task in range(tasks)]
            for place, group in zip(places, groups, strict=True):
                place.mkdir(parents=True)
                (place / "trials.txt").write_text("".join(f"{folder / trial.name}\n" for trial in group))
        run_dirs.write_text("".join(f"{place}\n" for place in places), encoding="utf-8")
        script = run_dirs.with_suffix(".sbatch")
        script.write_text(array_script(sweep, tasks, folder, cluster, run, bool(names)), encoding="utf-8")
        job = submit_script(script)
        sweep.arrays.append(job)
        for task, group in enumerate(groups):
            for trial in group:
                begin(trial, folder)
                trial.job = f"{job}_{task}"
    print(f"job {job}: {len(names) or tasks} trials in {folder}" + (f", {tasks} tasks" if sweep.together > 1 else ""))


def groups_of_tasks(trials: Sequence[Trial], most: int) -> list[list[Trial]]:
    """Return the trials of each task of an array: up to `most` of one base, in the order of their first."""
    groups: list[list[Trial]] = []
    for trial in trials:
        fitting = (g for g in groups if trial.base is not None and g[0].base == trial.base and len(g) < most)
        group = next(fitting, None)
        if group is None:
            groups.append([trial])
        else:
            group.append(trial)
    return groups


def list_path(sweep: Sweep, folder: Path) -> Path:
    """The run folders of the next array, a line each."""
    return folder / f"array-{len(sweep.arrays) + 1}.txt"


def array_script(
    sweep: Sweep, tasks: int, folder: Path, cluster: ClusterConfig, run: TrainConfig, are_drawn: bool = True
) -> str:
    """The batch script of the next array; its tasks draw their own trials unless they `are_drawn`."""
    python = cluster.python or ("python" if cluster.container else sys.executable)
    run_dir = array_run_dir(list_path(sweep, folder))
    if not are_drawn:
        run_dir = f"$({shlex.quote(python)} -m lightning_peft sweep ask {shlex.quote(str(folder))})"
    return batch_script(
        replace(cluster, python=python),
        name=folder.name,
        log=log_path(folder, "slurm-%A_%a.log"),
        train=TOGETHER_TRAIN_WORDS if sweep.together > 1 else ARRAY_TRAIN_WORDS,
        run_dir=run_dir,
        array=f"0-{tasks - 1}" + (f"%{sweep.parallel}" if sweep.parallel else ""),
        wandb="wandb" in run.logger,
        directory=sweep.directory,
        written=TOGETHER if sweep.together > 1 else ONE_RUN,
    )
