"""A sweep on disk: its trials, how each stands, and the one file that says so.

`sweep.json` is read and written under a lock by whoever works on the sweep. A state follows from the run folder,
the process and the queue, each time anew; the file keeps what was seen last.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_peft.checkpoint.atomic import atomic_file
from lightning_peft.cluster.job import QUEUED, Job
from lightning_peft.cluster.process import LEAVE, Process
from lightning_peft.strict_json import is_copy, json_text, read_object
from lightning_peft.sweeps.change_lock import locked

logger = logging.getLogger(__name__)

MANIFEST = "sweep.json"
WAITING, RUNNING, FINISHED, FAILED, LOST, PREEMPTED, INTERRUPTED, PAUSED, DIVERGED, CANCELLED = (
    "waiting", "running", "finished", "failed", "lost", "preempted", "interrupted", "paused", "diverged", "cancelled",
)  # fmt: skip
RESULT_NUMBERS = (
    "validation_loss", "train_loss", "steps", "trainable_parameters", "total_parameters", "tokens_per_second",
    "peak_memory_gib", "seconds",
)  # fmt: skip
"""Numbers that `result.json` of a finished run holds."""
LOCAL = "local"
"""`cluster` of a sweep of this machine's processes."""
HYDRA = "hydra"
"""`cluster` of a sweep that Hydra's launcher runs: nobody starts its trials again but the command itself."""
TO_BE_RETRIED = (FAILED, LOST, PREEMPTED, INTERRUPTED, PAUSED, DIVERGED, CANCELLED)
ENDED = (FINISHED, *TO_BE_RETRIED)
ENDED_BY_CLUSTER = {"PREEMPTED": PREEMPTED, "NODE_FAIL": LOST, "BOOT_FAIL": LOST}
"""States of a trial that left no result, by the cluster's word for its job's end, where that is not the trial's."""


@dataclass
class Trial:
    """One choice of the swept values."""

    name: str
    """Its folder inside the sweep's."""
    overrides: list[str]
    """The swept words, as in key=value."""
    state: str = WAITING
    attempts: int = 0
    """Starts by a worker, or submissions to the queue."""
    is_waiting: bool = True
    """True where no worker has begun it since it was submitted or retried."""
    exit_code: int | None = None
    """Exit status of the last attempt; null while it runs and where nobody was left to see it."""
    job_state: str | None = None
    """The cluster's word for how the last attempt's job ended, as OUT_OF_MEMORY; null before, and without a job."""
    result: dict[str, Any] | None = None
    """Its result.json."""
    process: Process | None = None
    job: str | None = None
    """The cluster's id of the task, as 123_4."""
    number: int | None = None
    """Optuna's number of the trial."""
    is_cancelled: bool = False
    other_words: list[str] = field(default_factory=list)
    """Words of its last start that the sweep's others may not have, "without WORD" for one of theirs that it lacks."""
    base: str | None = None
    """Word of the base that it shares with the trials it trains together with; null for one that trains by itself."""
    resumed_at: int | None = None
    """Step at which it was preempted when a worker last took it up again by itself."""
    rung_values: list[float | None] = field(default_factory=list)
    """The sweep's metric at each rung that the trial has reached, so that small is good; null for one not finite."""
    bracket: int = 0
    """Rungs that it does not pause at: of hyperband, which compares it with others of the same number."""
    spent_hours: float = 0.0
    """Device hours of the attempts before the last one."""
    counted_seconds: float | None = None
    """Seconds of the result that was last added to them, which stands there until the next start trains."""

    @property
    def values(self) -> dict[str, str]:
        """Return the value of each swept key."""
        pairs = (word.partition("=") for word in self.overrides)
        return {key.lstrip("+"): value for key, _, value in pairs}


@dataclass
class Sweep:
    """The content of `sweep.json`."""

    words: list[str]
    """The overrides that all trials share."""
    swept: list[str]
    """The words that say what is swept."""
    cluster: str
    """local, hydra, or a key of `CLUSTERS`."""
    metric: str
    """A number of result.json that is to be small, or large with a minus sign before its name."""
    search: str = "grid"
    pruning: str = "none"
    reduction: int = 3
    """Divisor of asha's trials: one in so many goes on from a rung."""
    rungs: list[int] = field(default_factory=list)
    """Steps at which trials pause; empty without pruning."""
    budget_gpu_hours: float | None = None
    """Device hours after which nothing begins any more; null for no limit."""
    is_spent: bool = False
    """True where the workers left because of that limit."""
    count: int = 0
    """Trials in all, of which optuna's are not drawn yet."""
    seed: int = 0
    parallel: int | None = None
    together: int = 1
    """Trials that share one process."""
    folder: str | None = None
    """Folder where this file was written: a copy of the folder has no processes and no jobs."""
    directory: str = "."
    """Directory where the sweep was submitted: relative paths of its words start there."""
    trials: list[Trial] = field(default_factory=list)
    workers: list[Process] = field(default_factory=list)
    """Processes on this machine."""
    arrays: list[str] = field(default_factory=list)
    """The cluster's ids of the jobs, each with several tasks."""

    def trial(self, name: str) -> Trial:
        for trial in self.trials:
            if trial.name == name:
                return trial
        raise ValueError(f"trials={name}: no such trial; the sweep has {', '.join(t.name for t in self.trials)}")

    def forget_machine(self, host: str) -> None:
        """Take the processes of a machine for over. Raises ValueError where the sweep has none there."""
        held = [trial for trial in self.trials if trial.process is not None and trial.process.host == host]
        workers = [worker for worker in self.workers if worker.host != host]
        if not held and len(workers) == len(self.workers):
            raise ValueError(
                f"gone={host}: no process of the sweep is on it; they are on {self.other_machines() or '-'}"
            )
        for trial in held:
            trial.process = None
        self.workers = workers

    def other_machines(self) -> str:
        """Return where processes of this sweep run that cannot be seen from here; empty where there are none."""
        running = [trial.process for trial in self.trials if trial.process is not None and trial.state not in ENDED]
        return ", ".join(sorted({process.host for process in [*running, *self.workers] if not process.is_here}))

    @property
    def has_slots(self) -> bool:
        """Return whether tasks of a job array run one trial after the other, as workers of this machine do."""
        return self.cluster not in (LOCAL, HYDRA) and (self.pruning != "none" or self.budget_gpu_hours is not None)

    @property
    def swept_keys(self) -> list[str]:
        return [word.partition("=")[0].lstrip("+") for word in self.swept]


def read_sweep(folder: Path) -> Sweep:
    """Read the sweep of a folder. Raises ValueError when there is none."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder}: holds no {MANIFEST}; name the folder given as sweep_dir to submit -m")
    values = read_object(path, "each trial's folder stands for itself, and goes on with train config_path=")
    try:
        found = [t | {"process": Process(**t["process"]) if t["process"] else None} for t in values["trials"]]
        workers = [Process(**worker) for worker in values["workers"]]
        sweep = Sweep(**(values | {"trials": [Trial(**trial) for trial in found], "workers": workers}))
        check_texts(sweep)
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"{path}: not a sweep as this version writes it ({error})"
        raise ValueError(f"{reason}; use the version that wrote it") from error
    if is_copy(path, sweep.folder):
        logger.info("%s: a copy of %s, to which what runs there belongs", folder, sweep.folder)
        sweep.workers, sweep.arrays = [], []
        for trial in sweep.trials:
            trial.process = trial.job = None
    return sweep


def check_texts(sweep: Sweep) -> None:
    """Raise TypeError for names and words that are none, as a hand that edits the file may leave them."""
    for trial in sweep.trials:
        for text in (trial.name, trial.state, *trial.overrides, *trial.other_words):
            if not isinstance(text, str):
                raise TypeError(f"{text!r} of a trial is no text")
        if trial.name in ("", ".", "..") or "/" in trial.name:
            raise TypeError(f"{trial.name!r} is no name of a folder in the sweep's")
    for text in (sweep.metric, sweep.directory, *sweep.words, *sweep.swept):
        if not isinstance(text, str):
            raise TypeError(f"{text!r} is no text")


def write_sweep(sweep: Sweep, folder: Path) -> None:
    sweep.folder = str(folder.resolve())
    with atomic_file(folder / MANIFEST) as path:
        path.write_text(json_text(asdict(sweep)))


@contextmanager
def changed_sweep(folder: Path) -> Iterator[Sweep]:
    """Yield the sweep, to be changed; it is written when the block ends without an exception."""
    if not (folder / MANIFEST).is_file():
        read_sweep(folder)
    with locked(folder):
        sweep = read_sweep(folder)
        yield sweep
        write_sweep(sweep, folder)


def begin(trial: Trial, folder: Path) -> None:
    """Count an attempt and drop what the last one left behind as its end.

    Requests that the last attempt did not live to fulfil go too.
    """
    trial.attempts += 1
    trial.is_waiting = False
    trial.exit_code = trial.job_state = None
    drop_result(trial, folder)
    (folder / trial.name / LEAVE).unlink(missing_ok=True)


def drop_result(trial: Trial, folder: Path) -> None:
    """Drop how the last start of a trial ended, and keep the hours it took."""
    trial.spent_hours += hours_of(read_result(folder / trial.name))
    (folder / trial.name / "result.json").unlink(missing_ok=True)


def refresh(sweep: Sweep, folder: Path, queue: Mapping[str, Job]) -> None:
    """Look at run folders, processes and the queue (job number to job), and set every trial's state by what is seen."""
    has_worker = any(worker.is_alive for worker in sweep.workers) or sweep.is_spent
    has_worker = has_worker or (sweep.has_slots and any(job.is_active for job in queue.values()))
    for trial in sweep.trials:
        job = queue.get(trial.job) if trial.job is not None else None
        if job is not None:
            trial.job_state = None if job.is_active else job.state
            trial.exit_code = None if job.is_active else job.exit_code
        trial.result = read_result(folder / trial.name)
        trial.state = state_of(trial, job, has_worker)
        note_rung(sweep, trial)


def note_rung(sweep: Sweep, trial: Trial) -> None:
    """Keep the metric of a trial that is paused at its next rung."""
    passed = trial.bracket + len(trial.rung_values)
    if trial.state != PAUSED or passed >= len(sweep.rungs) or trial.result is None:
        return
    if trial.result.get("steps") == sweep.rungs[passed]:
        value = metric_value(trial.result, sweep.metric.removeprefix("-"))
        trial.rung_values.append(-value if value is not None and sweep.metric.startswith("-") else value)


def state_of(trial: Trial, job: Job | None, has_worker: bool) -> str:
    status = trial.result["status"] if trial.result is not None else None
    if status == FINISHED:
        return FINISHED
    is_queued = job is not None and job.is_active and job.state in QUEUED
    if (job is not None and job.is_active and not is_queued) or (trial.process is not None and trial.process.is_alive):
        return RUNNING
    ended = trial.job_state if job is None else job.state  # the queue forgets what it said
    if trial.is_cancelled or (ended or "").startswith("CANCELLED"):
        return CANCELLED
    if is_queued:
        return WAITING
    if status is not None:
        return str(status)
    if trial.is_waiting and has_worker:
        return WAITING
    if ended in ENDED_BY_CLUSTER:
        return ENDED_BY_CLUSTER[ended]
    if ended is None and trial.state == CANCELLED:  # it was seen by a version that did not keep the queue's word
        return CANCELLED
    # There is no result: a batch script may end well all the same, so COMPLETED and an exit status of 0 say nothing.
    return FAILED if trial.exit_code or ended not in (None, "COMPLETED") else LOST


def state_in_words(trial: Trial) -> str:
    """Return the state, with why the cluster ended the trial where that says more, as "failed (out of memory)"."""
    if trial.job_state in (None, "COMPLETED", "FAILED") or trial.state not in (FAILED, LOST):
        return trial.state
    return f"{trial.state} ({trial.job_state.replace('_', ' ').lower()})"


def read_result(run_dir: Path) -> dict[str, Any] | None:
    """Return what `result.json` holds; None when the run has not ended by itself."""
    path = run_dir / "result.json"
    try:
        result = read_object(path, "taken for a run that did not live to write it")
        if not is_of_a_run(result):
            raise ValueError(f"{path}: damaged (not what a run writes); taken for a run that did not live to write it")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        logger.warning("%s", error)
        return None
    return result | {"metrics": result.get("metrics") or {}}


def is_of_a_run(result: Mapping[str, Any]) -> bool:
    """Return whether a result is one that a run writes, as a hand that edits the file may not leave it."""
    numbers = [result.get(name) for name in (*RESULT_NUMBERS, "device_hours", "rollbacks", "lr_factor")]
    is_left_midway = result.get("status") in (PREEMPTED, PAUSED)
    return (
        isinstance(result.get("status"), str)
        and all(number is None or type(number) in (int, float) for number in numbers)
        and all(isinstance(result.get(name) or {}, dict) for name in ("metrics", "content"))
        and not (is_left_midway and result.get("steps") is None)
    )


def hours_of(result: Mapping[str, Any] | None) -> float:
    """Return the device hours of the start that a result is of; 0 without one."""
    if result is None:
        return 0.0
    hours = result.get("device_hours")  # it is written since there are budgets
    return float((result.get("seconds") or 0.0) / 3600 if hours is None else hours)


def score(sweep: Sweep, trial: Trial) -> float | None:
    """Return the sweep's metric, so that smaller is better; None for a trial not finished or without such a number."""
    if trial.state != FINISHED:
        return None
    value = metric_value(trial.result, sweep.metric.removeprefix("-"))
    return -value if value is not None and sweep.metric.startswith("-") else value


def metric_value(result: Mapping[str, Any] | None, metric: str) -> float | None:
    """Return a number of a result, of its `metrics` where it is not found beside them; None where it is not finite."""
    if result is None:
        return None
    value = result.get(metric, result.get("metrics", {}).get(metric))
    return float(value) if type(value) in (int, float) and math.isfinite(value) else None
