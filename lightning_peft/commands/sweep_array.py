"""A sweep's trials as the tasks of one job of a cluster, as SLURM's job arrays are."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from lightning_peft.checkpoint.atomic import atomic_file
from lightning_peft.cluster.job import QUEUED, ClusterConfig, JobSpec
from lightning_peft.cluster.registry import CLUSTERS
from lightning_peft.config import TrainConfig
from lightning_peft.sweeps.next_trial import turn_of_slot, work_to_begin
from lightning_peft.sweeps.place import find_jobs
from lightning_peft.sweeps.sweep import Sweep, Trial, begin, changed_sweep


def submit_array(folder: Path, names: list[str], cluster: ClusterConfig, run: TrainConfig) -> None:
    """Submit these trials, or with no names as many tasks as Optuna has trials to draw; print the job's number.

    For a sweep with slots the slots are submitted, which take by themselves what there is to begin.
    """
    kind = CLUSTERS[cluster.name].cluster
    with changed_sweep(folder) as sweep:
        trials = [] if sweep.has_slots else [sweep.trial(name) for name in names]
        groups, work = groups_of_tasks(trials, sweep.together), array_work(sweep, trials, folder, run)
        tasks, run_dirs = work.tasks, list_path(sweep, folder)
        if not tasks:
            print(f"{folder}: sweep.parallel={sweep.parallel} slots are there already, and take what is to begin")
            return
        places = [folder / trial.name for trial in trials]
        if trials and sweep.together > 1:
            places = [run_dirs.with_suffix("") / str(task) for task in range(tasks)]
            for place, group in zip(places, groups, strict=True):
                place.mkdir(parents=True)
                (place / "trials.txt").write_text("".join(f"{folder / trial.name}\n" for trial in group))
        run_dirs.write_text("".join(f"{place}\n" for place in places), encoding="utf-8")
        path = run_dirs.with_suffix(Path(kind.file).suffix)
        path.write_text(kind.text(cluster, work), encoding="utf-8")
        job = kind.submit(path, work)
        sweep.arrays.append(job)
        for task, group in enumerate(groups):
            for trial in group:
                begin(trial, folder)
                trial.job = f"{job}_{task}"
    count = len(names) or (sweep.count if sweep.has_slots else tasks)
    in_tasks = f", {tasks} tasks" if sweep.together > 1 or sweep.has_slots else ""
    print(f"job {job}: {count} trials in {folder}{in_tasks}")


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
    """Return the path of the file with the run folders of the next array, a line each."""
    return folder / f"array-{len(sweep.arrays) + 1}.txt"


def task_folder(sweep: Sweep, folder: Path, task: str) -> Path:
    """Return the folder that a task, as 71_4, runs: that of its trial, or the one that lists several."""
    job, _, number = task.rpartition("_")
    lines = (folder / f"array-{sweep.arrays.index(job) + 1}.txt").read_text(encoding="utf-8").splitlines()
    return Path(lines[int(number)])


def array_work(sweep: Sweep, trials: Sequence[Trial], folder: Path, run: TrainConfig) -> JobSpec:
    """Return the work of the next array: to train these trials, or where there are none to draw the missing ones.

    `run` is the config of one of the trials. Slots are as many as have something to do at once, with those that are
    there already no more than `sweep.parallel`; the work has no task where those there are as many.
    """
    tasks, parallel = len(groups_of_tasks(trials, sweep.together)) or sweep.count - len(sweep.trials), sweep.parallel
    if sweep.has_slots:
        tasks, parallel = max(1, math.ceil(work_to_begin(sweep) / sweep.together)), None
        if sweep.parallel is not None:
            tasks = max(0, min(tasks, sweep.parallel - slots_at_work(sweep)))
    return JobSpec(
        name=folder.name,
        folder=folder,
        directory=sweep.directory,
        run_dirs=list_path(sweep, folder),
        tasks=tasks,
        parallel=parallel,
        is_asking=not trials or sweep.has_slots,
        takes_turns=sweep.has_slots,
        is_together=sweep.together > 1 and not sweep.has_slots,
        has_wandb="wandb" in run.logger,
    )


def slots_at_work(sweep: Sweep) -> int:
    """Count the slots that will ask for another trial: that wait for their start, or have a trial now.

    A slot without a trial has asked for the last time, and is about to leave.
    """
    busy = {trial.job for trial in sweep.trials}
    return sum(job.is_active and (job.state in QUEUED or job.id in busy) for job in find_jobs(sweep).values())


def turn(
    sweep: Sweep, folder: Path, task: str, ended: int | None, names: Sequence[str], draw: Callable[[], Trial]
) -> Path | None:
    """Return what a slot is to run now: a trial's folder, or one that lists several; None for it to leave.

    `ended` and `names` are those of `turn_of_slot`; `draw` adds Optuna's next trial to the sweep.
    """
    queue = find_jobs(sweep)
    trials = turn_of_slot(sweep, folder, task, ended, queue, names)
    if not trials and not sweep.is_spent and len(sweep.trials) < sweep.count:
        draw()
        trials = turn_of_slot(sweep, folder, task, None, queue)
    if len(trials) < 2:
        return folder / trials[0].name if trials else None
    place = folder / "slots" / task
    place.mkdir(parents=True, exist_ok=True)
    with atomic_file(place / "trials.txt") as path:
        path.write_text("".join(f"{folder / trial.name}\n" for trial in trials), encoding="utf-8")
    return place
