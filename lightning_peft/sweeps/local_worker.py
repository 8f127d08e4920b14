"""Run the trials of a sweep on this machine, one after the other, beside other workers of the same sweep.

    python -m lightning_peft.sweeps.local_worker SWEEP_DIR SLOT

A worker and each of its trials have a session of their own, so a closed terminal ends neither, and a trial outlives its
worker.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_peft.cluster.process import LEAVE, process, this_process
from lightning_peft.sweeps.next_trial import claim_next, work_to_begin
from lightning_peft.sweeps.sweep import RUNNING, Sweep, Trial, changed_sweep, read_sweep, refresh
from lightning_peft.threads import available_cores
from lightning_peft.tracking.run_log import PRINTED

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 2.0
"""Time between two looks of a worker without a trial for whether one may go on."""
GRACE_SECONDS = 30.0
"""Time from asking a trial to leave until it is killed, enough for a checkpoint."""


def start_workers(folder: Path) -> None:
    """Start as many workers as there is work for and leave them to themselves."""
    with changed_sweep(folder) as sweep:
        sweep.workers = [worker for worker in sweep.workers if worker.is_alive]
        for slot in range(len(sweep.workers), min(sweep.parallel or 1, work_to_begin(sweep))):
            command = [sys.executable, "-m", "lightning_peft.sweeps.local_worker", str(folder), str(slot)]
            # This is not subprocess, which takes a child that is left alone for a mistake.
            worker = os.posix_spawn(sys.executable, command, os.environ, file_actions=to_log(folder), setsid=True)
            sweep.workers.append(process(worker))


def to_log(folder: Path) -> list[tuple[Any, ...]]:
    """Return what gives a process nothing to read, and all that it prints to the end of the sweep's workers.txt."""
    append = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    return [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(folder / "workers.txt"), append, 0o644),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]


def work(folder: Path, slot: int) -> None:
    """Run trials until none is left to begin or to go on with."""
    directory = read_sweep(folder).directory
    try:
        os.chdir(directory)
    except OSError as error:  # a trial that needs something from there says so
        logger.warning("%s, where the sweep was submitted: %s; trials run in %s", directory, error.strerror, folder)
        os.chdir(folder)
    while True:
        trials = claim(folder)
        if trials:
            run(trials, folder, slot)
        elif this_process() not in read_sweep(folder).workers:
            return
        elif is_awaited(folder):
            time.sleep(SECONDS_BETWEEN_LOOKS)
        elif not drew_another(folder):
            return


def claim(folder: Path) -> list[Trial]:
    """Begin trials by this process and return them: those preempted or let on by a rung, else those nobody has begun.

    There is one, or as many as train together and share a base. Without any, and none to be drawn or to be waited for,
    this process signs off, as it does where the sweep's budget is spent.
    """
    with changed_sweep(folder) as sweep:
        if sweep.rungs or sweep.budget_gpu_hours is not None:
            refresh(sweep, folder, {})
        claimed = claim_next(sweep, folder)
        for trial in claimed:
            trial.process = this_process()
        is_over = not claimed and len(sweep.trials) >= sweep.count and not others_run(sweep)
        if sweep.is_spent or is_over:
            sweep.workers.remove(this_process())
    return claimed


def others_run(sweep: Sweep) -> bool:
    """Return whether a trial of a pruned sweep runs that may let another on when it reaches its rung."""
    return bool(sweep.rungs) and any(trial.state == RUNNING for trial in sweep.trials)


def is_awaited(folder: Path) -> bool:
    """Return whether this worker is to look again: it has not signed off, and nothing is left to be drawn."""
    sweep = read_sweep(folder)
    return this_process() in sweep.workers and bool(sweep.rungs) and len(sweep.trials) >= sweep.count


def drew_another(folder: Path) -> bool:
    """Have Optuna draw the next trial, in a process of its own as it needs Hydra; return False for a complete sweep."""
    sweep = read_sweep(folder)
    if len(sweep.trials) >= sweep.count:
        return False
    asked = subprocess.run(
        [sys.executable, "-m", "lightning_peft", "sweep", "ask", str(folder)], stdin=subprocess.DEVNULL
    )
    if asked.returncode:
        logger.error("sweep ask ended with status %d; this worker leaves", asked.returncode)
    return asked.returncode == 0


def run(trials: Sequence[Trial], folder: Path, slot: int) -> None:
    """Train a trial in a process of its own, or several together in one."""
    config, log_path = folder / trials[0].name / "config.yaml", folder / trials[0].name / PRINTED
    if len(trials) > 1:  # each has a log of its own all the same
        config, log_path = folder / f"together-{slot}.txt", folder / f"together-{slot}.log"
        config.write_text("".join(f"{folder / trial.name}\n" for trial in trials), encoding="utf-8")
    command = [sys.executable, "-m", "lightning_peft", "train", f"config_path={config}"]
    with log_path.open("a") as log:
        training = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=os.environ | share_of_machine(read_sweep(folder), slot),
        )
        with changed_sweep(folder) as sweep:
            for trial in trials:
                sweep.trial(trial.name).process = process(training.pid)
        exit_code = training.wait()
    with changed_sweep(folder) as sweep:
        for trial in map(sweep.trial, [trial.name for trial in trials]):
            if trial.process is not None:  # one that ended before the others has said how
                trial.exit_code = exit_code
    logger.info("%s: exit status %d", ", ".join(trial.name for trial in trials), exit_code)


def share_of_machine(sweep: Sweep, slot: int) -> dict[str, str]:
    """Return the environment that keeps a worker's trials to its part of the cores and GPUs."""
    parallel = sweep.parallel or 1
    share = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, available_cores() // parallel)))}
    devices = visible_devices()
    if devices:
        own = devices[slot * len(devices) // parallel : (slot + 1) * len(devices) // parallel]
        share["CUDA_VISIBLE_DEVICES"] = ",".join(own or [devices[slot % len(devices)]])
    return share


def visible_devices() -> list[str]:
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return visible.split(",")
    # torch takes seconds to import and only this needs it.
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def end(trial: Trial, sweep: Sweep, folder: Path) -> None:
    """Ask a running trial to leave, and make it leave after GRACE_SECONDS; its ranks are in its process group.

    One whose process others go on in is asked by a file, and leaves at its next step.
    """
    if trial.process is None or not trial.process.is_alive:
        return
    if any(other.process == trial.process and not other.is_cancelled for other in sweep.trials):
        (folder / trial.name / LEAVE).touch()
        logger.info("%s: leaves at its next step; others train in its process", trial.name)
        return
    os.killpg(trial.process.pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    while trial.process.is_alive:
        if time.monotonic() > deadline:
            os.killpg(trial.process.pid, signal.SIGKILL)
        time.sleep(0.05)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    try:
        work(Path(sys.argv[1]), int(sys.argv[2]))
    except (ValueError, OSError) as error:  # as where the sweep was moved; its trials and status say what is left
        sys.exit(f"error: {error}; this worker leaves")
