"""The common part of all clusters: what a run asks for, what a job runs, how it stands, and commands that can fail."""

import os
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

SECONDS = 60
"""Time that a cluster's command may take; a controller that is away makes it wait for about as long."""
SAVED = 75
"""Exit status of `train` that has saved and is to be started again."""
ONE_RUN = 'ls "$run_dir/checkpoints" 2> /dev/null'
"""Bash that lists what tells whether a start of one run got on."""
TOGETHER = 'while read -r trial; do ls "$trial/checkpoints" 2> /dev/null; done < "$run_dir/trials.txt"'
"""The same for trials that train together, whose folders stand in trials.txt."""
TASK = "LIGHTNING_PEFT_TASK"
"""Environment variable with the task that a process runs, where the cluster has no variable for it."""


class ClusterError(RuntimeError):
    """A cluster's command is not there, or refuses what it was asked; says why in one line."""


class ClusterSilent(ClusterError):
    """A cluster gave no answer, and may have done what it was asked all the same."""


@dataclass
class ClusterConfig:
    """The cluster on which `submit` runs a training, and the resources it asks for there."""

    name: str = ""
    """The cluster's row in `CLUSTERS`, set by its option file."""
    nodes: int = 1
    """Nodes of a run."""
    gpus_per_node: int = 0
    """GPUs on each node; 0 runs on CPUs."""
    setup: list[str] = field(default_factory=list)
    """Lines of bash before the ranks start: modules, a virtual environment, variables."""
    python: str | None = None
    """Python that runs the ranks; null takes the one that submits, in a container the one on its PATH."""
    grace: int = 120
    """Seconds that a run gets to save and make way for its continuation."""
    dry_run: bool = False
    """Print what would be handed to the cluster; write and submit nothing."""

    ranks_option: ClassVar[str] = "gpus_per_node"
    """The option that says how many ranks a node has."""
    MINIMUMS: ClassVar[Mapping[str, int]] = {"nodes": 1, "gpus_per_node": 0, "grace": 1}

    def __post_init__(self) -> None:
        for key, minimum in self.MINIMUMS.items():
            value = getattr(self, key)
            if value is not None and value < minimum:
                raise ValueError(f"cluster.{key}={value}: must be at least {minimum}")

    @property
    def ranks_per_node(self) -> int:
        return self.gpus_per_node or 1


QUEUED = (
    "PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT",
)  # fmt: skip
"""States of a job that does not run yet, or not any more until it starts again."""
ACTIVE = (*QUEUED, "RUNNING", "COMPLETING", "SUSPENDED", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED")
"""States of a job that runs or will run."""


@dataclass(frozen=True)
class Job:
    """A cluster's words about a job, or about one task of several."""

    id: str
    """The id, as 71, or 71_4 for task 4 of job 71."""
    state: str
    """The state, as PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, TIMEOUT, NODE_FAIL, OUT_OF_MEMORY, PREEMPTED."""
    exit_code: int
    restarts: int

    @property
    def is_active(self) -> bool:
        """Return whether the job runs or will run."""
        return self.state in ACTIVE


@dataclass(frozen=True)
class JobSpec:
    """The work of a job: one run, or the trials of a sweep, one or several in each task."""

    name: str
    """A name for people."""
    folder: Path
    """Absolute folder for the job's file and logs."""
    directory: str
    """The folder that relative paths of the run count from."""
    run_dirs: Path | None = None
    """File with the folders that the tasks run, a line each; None for one run, which `folder` is of."""
    tasks: int = 1
    parallel: int | None = None
    """Tasks at once; None for as many as the cluster will run."""
    is_asking: bool = False
    """True where each task asks the sweep for a trial, which is drawn then."""
    takes_turns: bool = False
    """True where each task is a slot, which asks the sweep for one trial after the other until it has none."""
    is_together: bool = False
    """True where a folder in `run_dirs` lists, in trials.txt, several that train in one process."""
    has_wandb: bool = False

    @property
    def written(self) -> str:
        """Return bash that lists what tells whether a start got on."""
        return TOGETHER if self.is_together else ONE_RUN


class Cluster(ABC):
    """The way jobs of one kind of cluster are written, submitted, watched and cancelled."""

    file: ClassVar[str]
    """Name of a job's file, with the extension that is the cluster's."""
    cancels_tasks: ClassVar[bool] = True
    """True where one task of a job can be ended, and the others go on."""
    shares_files: ClassVar[bool] = False
    """True where its nodes see the files of the machine that submits."""

    @abstractmethod
    def check(self, config: ClusterConfig, work: JobSpec) -> None:
        """Raise ValueError for work that this cluster cannot do as it is asked."""

    @abstractmethod
    def text(self, config: ClusterConfig, work: JobSpec) -> str:
        """Return the file that is handed to the cluster."""

    @abstractmethod
    def submit(self, path: Path, work: JobSpec) -> str:
        """Hand the file over and return the job's id. Raises ClusterError with what was wrong."""

    @abstractmethod
    def find(self, job_ids: Iterable[str]) -> dict[str, Job]:
        """Return the jobs by id, one of several tasks by these (71_0, 71_1 ...). Forgotten jobs are absent."""

    def recall(self, tasks: Iterable[str], found: Mapping[str, Job], folder: Path) -> dict[str, Job]:
        """Return what can be told of those of `tasks` that the cluster's queue has dropped.

        `found` is what it knows of their job, and `folder` that of the job's file and logs.
        """
        return {}

    @abstractmethod
    def cancel(self, job_ids: Iterable[str]) -> None:
        """End jobs, or single tasks of them."""

    @abstractmethod
    def how_to_cancel(self, job_id: str) -> str:
        """Return the command with which a person ends a job."""


@dataclass(frozen=True)
class Commands:
    """The commands of a cluster, and what a person is told where one gives no answer."""

    missing: str
    """The message, as in "SLURM's commands have to be on PATH here"."""
    silent: str
    """The message, as in "no answer from SLURM in 60 s; squeue shows what became of it"."""
    seconds: float = SECONDS
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables beside those of this process."""

    def run(self, *command: str) -> str:
        """Run one of the commands and return its output. Raises ClusterError with what the command said was wrong."""
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=self.seconds, env=os.environ | self.environment
            )
        except OSError as error:
            raise ClusterError(f"{command[0]}: not found; {self.missing}") from error
        except subprocess.TimeoutExpired as error:
            raise ClusterSilent(f"{command[0]}: {self.silent}") from error
        if done.returncode:
            said = done.stderr.replace(f"{command[0]}: error: ", "").strip() or f"exit status {done.returncode}"
            raise ClusterError(f"{' '.join(command)}: {said}")
        return done.stdout


def own_task() -> str | None:
    """Return the id of the task that this process runs for a sweep, as 71_4; None outside of one."""
    if TASK in os.environ:
        return os.environ[TASK]
    array, task = (os.environ.get(f"SLURM_ARRAY_{part}_ID") for part in ("JOB", "TASK"))
    return None if array is None else f"{array}_{task}"
