"""SLURM: the resources of a job, its batch script, and the commands that submit, watch, cancel and requeue it."""

import logging
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from lightning_peft.cluster.job import (
    ONE_RUN,
    SECONDS,
    Cluster,
    ClusterConfig,
    ClusterError,
    Commands,
    Job,
    JobSpec,
)
from lightning_peft.cluster.slurm_slot import SECONDS_TO_START, SLOT
from lightning_peft.cluster.stalls import stalls

logger = logging.getLogger(__name__)

SLURM_COMMANDS = Commands(
    "SLURM's commands have to be on PATH here",
    f"no answer from SLURM in {SECONDS} s; squeue shows what became of it",
    environment={"SLURM_BITSTR_LEN": "0"},  # else the list of an array's tasks is cut after 64 characters
)
OUT_OF_MEMORY = "OUT_OF_MEMORY"
BEGUN = "begun"
"""Folder in that of an array's logs with an empty file for each task that has begun, as 71_4, and for their array."""


@dataclass
class SlurmConfig(ClusterConfig):
    """The place on a SLURM cluster where `submit` runs a training, and the resources it asks for there."""

    name: str = "slurm"
    partition: str | None = None
    """SLURM partition; null takes the cluster's default."""
    tasks_per_node: int | None = None
    """Ranks on each node; null takes one for each GPU, else one."""
    cpus_per_task: int | None = None
    """CPU cores of a rank; null leaves it to the cluster."""
    time: int | None = None
    """Minutes until SLURM ends the job; null takes the partition's limit."""
    grace: int = 120
    """Seconds before the end of `time` at which the run is told to save and make way for its continuation."""
    container: str | None = None
    """Command that runs the ranks in a container, as "apptainer exec --nv image.sif"."""
    sbatch: list[str] = field(default_factory=list)
    """Further options of sbatch, as [--account physics, --exclusive]."""

    ranks_option: ClassVar[str] = "tasks_per_node"
    MINIMUMS: ClassVar[Mapping[str, int]] = {
        "nodes": 1, "gpus_per_node": 0, "tasks_per_node": 1, "cpus_per_task": 1, "time": 1, "grace": 1
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpus_per_node and self.tasks_per_node not in (None, self.gpus_per_node):
            raise ValueError(
                f"cluster.tasks_per_node={self.tasks_per_node} cluster.gpus_per_node={self.gpus_per_node}: "
                "a rank takes one GPU, so leave tasks_per_node out"
            )
        if self.time is not None and self.grace >= self.time * 60:
            raise ValueError(f"cluster.grace={self.grace} cluster.time={self.time}: seconds before the end of minutes")

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or self.gpus_per_node or 1


BODY = """\
{setup}
# The ranks meet on the first node, at the first free port from one of the job's own on.
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((15000 + SLURM_JOB_ID % 10000))
is_taken() {{ (: > "/dev/tcp/$1/$MASTER_PORT") 2> /dev/null; }}
while is_taken "$MASTER_ADDR" || is_taken localhost; do MASTER_PORT=$((MASTER_PORT + 1)); done
{wandb}
# The signals are for the ranks; this shell outlives them.
trap {on_signal} TERM USR1 USR2

# The job is to run on unless it was cancelled; a controller that does not answer is asked again.
is_running() {{
  local state
  for _ in {{1..60}}; do
    if state=$(squeue --noheader --jobs="$job" --format=%T); then [ "$state" = RUNNING ]; return; fi
    sleep 10
  done
  echo "error: no answer of squeue in ten minutes, so job $job leaves" >&2
  return 1
}}

{stalls}
"""
ONE = """\
run_dir={run_dir}
written() {{ {written}; }}
checkpoints=$(written)
# The ranks get the environment of this script, also where sbatch was told to export nothing.
srun --export=ALL --kill-on-bad-exit=1 {python} -m lightning_peft train {train}
status=$?

# 75: a signal came and the run is saved, so the same job goes on from there, unless it was cancelled.
# Any other status is the run's own: a crash shows as FAILED.
job=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}
job=${{job:-$SLURM_JOB_ID}}
if [ "$status" -eq 75 ] && is_running; then
  if stalls; then exit 1; fi
  scontrol requeue "$job"
fi
exit "$status"
"""


WANDB = """
# Weights & Biases' service starts here: it outlives the signals that end the ranks, and finishes writing.
export WANDB_SERVICE=$({wandb} beta core start --idle-timeout 5m 2>&1 | grep -oE '^3-[0-9]+-[a-z]+-.*')
[ -n "$WANDB_SERVICE" ] || {{ unset WANDB_SERVICE; echo "wandb: no service; the next start logs what is cut off"; }}
"""


def batch_script(
    cluster: SlurmConfig,
    name: str,
    log: str,
    train: str,
    run_dir: str,
    array: str | None = None,
    wandb: bool = False,
    directory: str | None = None,
    written: str = ONE_RUN,
    slot_of: Path | None = None,
    begun: Path | None = None,
) -> str:
    """Return a batch script of one run, or of an array of runs with `array` as sbatch takes it ("0-7%4").

    `log` may hold sbatch's %j, %A and %a. `run_dir`, the run's folder, and `train`, the words after `lightning-peft
    train`, every rank's own, are bash, and so is `written`, which lists what tells whether a start got on. Relative
    paths count from `directory`; null leaves that to whoever submits. With `slot_of`, a sweep's folder, the tasks run
    what that sweep gives them instead, one trial after the other. With `begun`, a folder, each task of an array leaves
    its mark there.
    """
    needs = [
        directive("job-name", name),
        directive("output", log),
        *([directive("chdir", directory)] if directory else []),
        *([f"--array={array}"] if array else []),
        *([directive("partition", cluster.partition)] if cluster.partition else []),
        f"--nodes={cluster.nodes}",
        f"--ntasks-per-node={cluster.ranks_per_node}",
        *([f"--gpus-per-node={cluster.gpus_per_node}"] if cluster.gpus_per_node else []),
        *([f"--cpus-per-task={cluster.cpus_per_task}"] if cluster.cpus_per_task else []),
        *([f"--time={cluster.time}"] if cluster.time else []),
        *cluster.sbatch,
    ]
    resumes = [f"--signal=USR1@{cluster.grace}", "--requeue", "--open-mode=append"]
    head = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in needs),
        f"# The ranks are told {cluster.grace} s before the time limit; then the job is requeued, its log continued.",
        *(f"#SBATCH {option}" for option in resumes),
    ]
    if begun is not None:
        head += ["", f': > {shlex.quote(str(begun))}/"${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"']
    python = " ".join([*([cluster.container] if cluster.container else []), shlex.quote(cluster.python or "python")])
    setup = "\n".join(["", "# The environment of the ranks.", *cluster.setup, ""]) if cluster.setup else ""
    service = WANDB.format(wandb=f"{python} -m wandb") if wandb else ""
    counting = stalls("more cluster.time, or less cluster.grace")
    body = BODY.format(setup=setup, wandb=service, on_signal=":" if slot_of is None else "told=1", stalls=counting)
    if slot_of is None:
        body += ONE.format(python=python, train=train, run_dir=run_dir, written=written)
    else:
        body += SLOT.format(python=python, folder=shlex.quote(str(slot_of)), least=cluster.grace + SECONDS_TO_START)
    return "\n".join([*head, body])


def directive(option: str, value: str) -> str:
    """Return an option of a `#SBATCH` line, its value quoted where sbatch would end it at a blank or a #."""
    if re.fullmatch(r"[\w./%+:=,@^-]*", value):
        return f"--{option}={value}"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'--{option}="{escaped}"'


def log_path(folder: Path, name: str) -> str:
    """Return the log `name`, which may hold %j, %A and %a, in a folder whose own % signs mean themselves.

    Raises ValueError for a folder that no #SBATCH line can name.
    """
    if any(character in str(folder) for character in "\\\n"):
        raise ValueError(f"run_dir={str(folder)!r}: SLURM takes no path with a backslash or a line break in it")
    return f"{str(folder).replace('%', '%%')}/{name}"


def train_words(config_path: Path) -> str:
    """Return `train` of `batch_script` for one run."""
    return f"config_path={shlex.quote(str(config_path.resolve()))}"


ARRAY_TRAIN_WORDS = 'config_path="$run_dir/config.yaml"'
"""`train` of `batch_script` for an array."""


TOGETHER_TRAIN_WORDS = 'config_path="$run_dir/trials.txt"'
"""`train` of `batch_script` for an array whose tasks train several trials each."""


def array_run_dir(run_dirs: Path) -> str:
    """Return `run_dir` of `batch_script` for an array: task i runs the folder in line i (from 0) of a file of folders.

    A relative path counts from the folder in which sbatch is called.
    """
    return f'$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {shlex.quote(str(run_dirs))})'


class Slurm(Cluster):
    """Batch scripts, job arrays and requeues."""

    file = "job.sbatch"
    shares_files = True

    def check(self, config: ClusterConfig, work: JobSpec) -> None:
        log_path(work.folder, "")
        assert isinstance(config, SlurmConfig)
        if work.is_asking and config.container is not None:
            raise ValueError(
                f"cluster.container={config.container}: here each task asks the sweep for its trial, with SLURM's "
                "commands, which are outside of the container; bring the environment by cluster.setup and "
                "cluster.python, or use a grid or random draws without sweep.pruning and sweep.budget_gpu_hours"
            )

    def text(self, config: ClusterConfig, work: JobSpec) -> str:
        assert isinstance(config, SlurmConfig)
        python = config.python or ("python" if config.container else sys.executable)
        train, run_dir = train_words(work.folder / "config.yaml"), shlex.quote(str(work.folder))
        if work.run_dirs is not None:
            train = TOGETHER_TRAIN_WORDS if work.is_together else ARRAY_TRAIN_WORDS
            run_dir = array_run_dir(work.run_dirs)
        if work.is_asking:
            run_dir = f"$({shlex.quote(python)} -m lightning_peft sweep ask {shlex.quote(str(work.folder))})"
        return batch_script(
            replace(config, python=python),
            name=work.name,
            log=log_path(work.folder, "slurm-%j.log" if work.run_dirs is None else "slurm-%A_%a.log"),
            train=train,
            run_dir=run_dir,
            array=None if work.run_dirs is None
            else f"0-{work.tasks - 1}" + (f"%{work.parallel}" if work.parallel else ""),
            wandb=work.has_wandb,
            directory=work.directory,
            written=work.written,
            slot_of=work.folder if work.takes_turns else None,
            begun=None if work.run_dirs is None else work.folder / BEGUN,
        )  # fmt: skip

    def submit(self, path: Path, work: JobSpec) -> str:
        if work.run_dirs is not None:
            (work.folder / BEGUN).mkdir(exist_ok=True)
        job = SLURM_COMMANDS.run("sbatch", "--parsable", str(path)).strip().partition(";")[0]
        if work.run_dirs is not None:
            (work.folder / BEGUN / job).touch()  # arrays of before leave no marks
        return job

    def find(self, job_ids: Iterable[str]) -> dict[str, Job]:
        """Return the jobs by id, an array by its tasks (71_0, 71_1 ...). Forgotten jobs are absent.

        slurmctld forgets finished jobs after minutes (MinJobAge); sacct, where there is accounting, remembers them.
        """
        found: dict[str, Job] = {}
        for job_id in job_ids:
            found |= {job.id: job for job in _from_slurmctld(job_id) or _from_accounting([job_id])}
        return found

    def recall(self, tasks: Iterable[str], found: Mapping[str, Job], folder: Path) -> dict[str, Job]:
        """Return the tasks that slurmctld has dropped from an array of which it knows others, and why tasks failed.

        sacct says both. It has no record of a task that was cancelled before it began, which slurmctld drops at once:
        that has left no mark, where the tasks of its array leave them.
        """
        arrays = {job_id.partition("_")[0] for job_id in found if "_" in job_id}
        gone = [task for task in tasks if task not in found and task.partition("_")[0] in arrays]
        failed = [job.id for job in found.values() if job.state == "FAILED"]
        if not gone and not failed:
            return {}
        told = {job.id: job for job in _from_accounting({task.partition("_")[0] for task in (*gone, *failed)})}
        known = {task: told[task] for task in gone if task in told}
        known |= {task: told[task] for task in failed if task in told and told[task].state == OUT_OF_MEMORY}
        marks = folder / BEGUN
        untold = [task for task in gone if task not in known and (marks / task.partition("_")[0]).exists()]
        never = [task for task in untold if not (marks / task).exists()]
        return known | {task: Job(task, "CANCELLED", 0, 0) for task in never}

    def cancel(self, job_ids: Iterable[str]) -> None:
        SLURM_COMMANDS.run("scancel", *job_ids)

    def how_to_cancel(self, job_id: str) -> str:
        return f"scancel {job_id}"


def _from_slurmctld(job_id: str) -> list[Job]:
    try:
        lines = SLURM_COMMANDS.run("scontrol", "--oneliner", "show", "job", job_id).splitlines()
    except ClusterError as error:
        if "Invalid job id" in str(error):
            return []
        raise
    jobs: list[Job] = []
    for line in lines:
        fields = dict(word.partition("=")[::2] for word in line.split(" ") if "=" in word)
        state, exit_code = fields["JobState"], exit_status(fields["ExitCode"])
        ids = [fields["JobId"]]
        if "ArrayJobId" in fields:
            ids = [f"{fields['ArrayJobId']}_{task}" for task in array_tasks(fields["ArrayTaskId"])]
        jobs += [Job(one, state, exit_code, int(fields["Restarts"])) for one in ids]
    return [job for job in jobs if job_id in (job.id, job.id.partition("_")[0])]


def _from_accounting(job_ids: Iterable[str]) -> list[Job]:
    """Return the jobs that have ended, as sacct remembers them.

    slurmctld does not know them, so one that is said to run or to wait there was lost by it.
    """
    fields, jobs = "--format=JobID,State,ExitCode", f"--jobs={','.join(sorted(job_ids))}"
    try:
        table = SLURM_COMMANDS.run("sacct", "--noheader", "--parsable2", fields, jobs)
    except ClusterError as error:
        if "accounting storage is disabled" not in str(error):
            logger.warning("%s; jobs that SLURM's controller has forgotten count as lost meanwhile", error)
        return []
    found: dict[str, Job] = {}
    for line in table.splitlines():
        one, state, code = line.split("|")
        one, _, step = one.partition(".")
        array, _, tasks = one.removesuffix("+0").partition("_")  # the first part of a heterogeneous job has its id
        ids = [f"{array}_{task}" for task in array_tasks(tasks.strip("[]"))] if tasks else [array]
        if not step:
            # "CANCELLED by 0" names who; restarts are not kept by job but by record.
            found |= {each: Job(each, state.partition(" ")[0], exit_status(code), 0) for each in ids}
        elif state == OUT_OF_MEMORY and found[ids[0]].state == "FAILED":
            # The ranks are killed, and srun ends with 1 as it does for others.
            found[ids[0]] = replace(found[ids[0]], state=OUT_OF_MEMORY)
    return [job for job in found.values() if not job.is_active]


def exit_status(text: str) -> int:
    """Return the exit status that SLURM writes as "status:signal", as bash has it: 128 and the number of a signal."""
    status, _, number = text.partition(":")
    signal = int(number or 0)
    if signal == 125:  # SLURM's word for what Linux killed for its memory, and no signal
        signal = 9
    return int(status) or (128 + signal if signal else 0)


def array_tasks(text: str) -> list[int]:
    """Return the tasks that SLURM writes as "0-3,7%2", and every second one as "0-8:2"."""
    tasks: list[int] = []
    for part in re.sub(r"%\d+$", "", text).split(","):
        ends, _, step = part.partition(":")
        first, _, last = ends.partition("-")
        tasks += range(int(first), int(last or first) + 1, int(step or 1))
    return tasks
