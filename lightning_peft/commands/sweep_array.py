"""A sweep's trials as the tasks of one SLURM job array."""

import shlex
import sys
from dataclasses import replace
from pathlib import Path

from lightning_peft.cluster.slurm import (
    ARRAY_TRAIN_WORDS,
    ClusterConfig,
    array_run_dir,
    batch_script,
    log_path,
    submit_script,
)
from lightning_peft.config import TrainConfig
from lightning_peft.sweeps.sweep import Sweep, begin, changed_sweep


def submit_array(folder: Path, names: list[str], cluster: ClusterConfig, run: TrainConfig) -> None:
    """Submit these trials, or with no names as many tasks as Optuna has trials to draw. Prints the job's number."""
    with changed_sweep(folder) as sweep:
        tasks = len(names) or sweep.count - len(sweep.trials)
        run_dirs = list_path(sweep, folder)
        run_dirs.write_text("".join(f"{folder / name}\n" for name in names), encoding="utf-8")
        script = run_dirs.with_suffix(".sbatch")
        script.write_text(array_script(sweep, tasks, folder, cluster, run, bool(names)), encoding="utf-8")
        job = submit_script(script)
        sweep.arrays.append(job)
        for task, name in enumerate(names):
            trial = sweep.trial(name)
            begin(trial, folder)
            trial.job = f"{job}_{task}"
    print(f"job {job}: {tasks} trials in {folder}")


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
        train=ARRAY_TRAIN_WORDS,
        run_dir=run_dir,
        array=f"0-{tasks - 1}" + (f"%{sweep.parallel}" if sweep.parallel else ""),
        wandb="wandb" in run.logger,
        directory=sweep.directory,
    )
