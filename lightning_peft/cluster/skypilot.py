"""SkyPilot: a managed job for each run, on whichever cloud has what it asks for, spot machines included.

SkyPilot starts a job again whose machines were taken away, and one that left with status 75; both go on from the
checkpoint in the bucket.
"""

import json
import os
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_peft.cluster.documents import yaml_text
from lightning_peft.cluster.job import SAVED, TASK, Cluster, ClusterConfig, ClusterError, Commands, Job, JobSpec
from lightning_peft.cluster.supervised import check_draws_nothing, check_is_shared, script

SECONDS = 900
"""Time that a launch may take, which starts a controller first where none is up."""
SKY = Commands(
    "SkyPilot's command has to be on PATH here: pip install skypilot",
    f"no answer from SkyPilot in {SECONDS} s; sky jobs queue shows what became of it",
    SECONDS,
)
MODE = "MOUNT_CACHED"
"""The mount of buckets: through a cache on the node's disk, as a direct mount takes no appended lines."""
NUMBER = "LIGHTNING_PEFT_TASK_NUMBER"
"""Environment variable with the number of a task."""
NO_JOBS = ("ClusterNotUp", "No in-progress managed jobs")
"""Words of SkyPilot where the controller, which stops when it has been idle, is not up."""
OF_A_SWEEP = re.compile(r"_\d+$")
"""The end of a task's id; a job's own id ends with six letters that are no number behind a _."""
WORDS = {
    "PENDING": "PENDING", "SUBMITTED": "PENDING", "STARTING": "PENDING", "RECOVERING": "REQUEUED",
    "RUNNING": "RUNNING", "CANCELLING": "RUNNING", "SUCCEEDED": "COMPLETED", "CANCELLED": "CANCELLED",
}  # fmt: skip
"""SkyPilot's words for the state of a job -> ours; those that begin with FAILED are failures."""


@dataclass
class SkyPilotConfig(ClusterConfig):
    """The clouds in which `submit` runs a training, and the machines there."""

    name: str = "skypilot"
    accelerator: str | None = None
    """Kind of GPU, as H100 or A100-80GB; gpus_per_node says how many."""
    infra: str | None = None
    """Cloud, region and zone, as aws/us-east-1 or kubernetes; null takes the cheapest."""
    spot: bool = False
    """Take spot machines, which may be taken away."""
    cpus: str | None = None
    """CPU cores of a node, as 8+; null takes what comes with the GPUs."""
    memory: str | None = None
    """GiB of memory of a node, as 64+; null takes what comes with the GPUs."""
    disk: int | None = None
    """GB of disk of a node; null takes SkyPilot's default."""
    image: str | None = None
    """Image of the machines, as docker:me/lightning_peft:1; null takes the cloud's, where `setup` installs."""
    workdir: str | None = None
    """Folder of this machine that is copied to each node and that relative paths count from; null copies none."""
    volumes: dict[str, str] = field(default_factory=dict)
    """Path to the bucket that is mounted there, as {/runs: "s3://my-runs"}; this machine has to see the bucket of the
    run's folder under the same path."""
    environment: dict[str, str | None] = field(default_factory=dict)
    """Environment variables of the job; null as a value takes this machine's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.accelerator) != bool(self.gpus_per_node):
            raise ValueError(
                f"cluster.accelerator={self.accelerator} cluster.gpus_per_node={self.gpus_per_node}: "
                "SkyPilot takes a kind and a number of GPUs, or neither"
            )


class SkyPilot(Cluster):
    """Managed jobs: one for a run, and one for each task of a sweep."""

    file = "job.sky.yaml"

    def check(self, config: ClusterConfig, work: JobSpec) -> None:
        assert isinstance(config, SkyPilotConfig)
        check_is_shared(config.volumes, work.folder, config.name)
        check_draws_nothing(config, work)
        environment_of(config)
        if work.parallel is not None:
            raise ValueError(
                f"sweep.parallel={work.parallel} cluster=skypilot: SkyPilot decides how many managed jobs run at once; "
                "leave it out"
            )

    def text(self, config: ClusterConfig, work: JobSpec) -> str:
        assert isinstance(config, SkyPilotConfig)
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", work.name).strip("-._") or "run"
        name = f"{name if name[0].isalpha() else f'run-{name}'}-{secrets.token_hex(3)}"
        resources: dict[str, Any] = {
            "infra": config.infra,
            "accelerators": f"{config.accelerator}:{config.gpus_per_node}" if config.accelerator else None,
            "cpus": config.cpus,
            "memory": config.memory,
            "disk_size": config.disk,
            "image_id": config.image,
            "use_spot": config.spot or None,
            "job_recovery": {"max_restarts_on_errors": 0, "recover_on_exit_codes": [SAVED]},
        }
        run = script(
            config,
            work,
            task=f"${{{TASK}:-{name}}}",
            number=NUMBER,
            node="$SKYPILOT_NODE_RANK",
            first_node='"$(head -n 1 <<< "$SKYPILOT_NODE_IPS")"',
        )
        task = {
            "name": name,
            "resources": {key: value for key, value in resources.items() if value is not None},
            "num_nodes": config.nodes,
            "workdir": config.workdir,
            "file_mounts": {path: {"source": bucket, "mode": MODE} for path, bucket in config.volumes.items()},
            "envs": environment_of(config) or None,
            "run": run,
        }
        return yaml_text({key: value for key, value in task.items() if value is not None})

    def submit(self, path: Path, work: JobSpec) -> str:
        text = path.read_text(encoding="utf-8")
        (name,) = re.findall(r"^name: (\S+)$", text, re.MULTILINE)
        launch = ("sky", "jobs", "launch", "--yes", "--detach-run")
        if work.run_dirs is None:
            SKY.run(*launch, "--name", name, str(path))
            return str(name)
        started = []
        try:
            for number in range(work.tasks):
                task = f"{name}_{number}"
                words = ("--env", f"{TASK}={task}", "--env", f"{NUMBER}={number}")
                SKY.run(*launch, "--name", sky_name(task), *words, str(path))
                started.append(task)
        except ClusterError:
            if started:
                self.cancel(started)
            raise
        return str(name)

    def find(self, job_ids: Iterable[str]) -> dict[str, Job]:
        ids = list(job_ids)
        if not ids:
            return {}
        try:
            records = json.loads(SKY.run("sky", "jobs", "queue", "--all", "--output", "json"))
        except ClusterError as error:
            if not any(words in str(error) for words in NO_JOBS):
                raise
            return {}
        return {job.id: job for job in jobs_of(ids, records)}

    def cancel(self, job_ids: Iterable[str]) -> None:
        names = {name for job_id in job_ids for name in self.names_of(job_id)}
        for name in sorted(names):
            SKY.run("sky", "jobs", "cancel", "--yes", "--name", name)

    def names_of(self, job_id: str) -> list[str]:
        """Return SkyPilot's names of a job; for a sweep's job the names of all its tasks that are not over."""
        if OF_A_SWEEP.search(job_id):
            return [sky_name(job_id)]
        found = self.find([job_id])
        return [sky_name(job.id) for job in found.values() if job.is_active]

    def how_to_cancel(self, job_id: str) -> str:
        return f"sky jobs cancel --name {job_id}"


def environment_of(config: SkyPilotConfig) -> dict[str, str]:
    """Return the variables with their values. Raises ValueError for a variable that this machine lacks."""
    found = {}
    for name, value in config.environment.items():
        if value is None and name not in os.environ:
            raise ValueError(f"cluster.environment={{{name}: null}}: this machine has no such variable")
        found[name] = os.environ[name] if value is None else value
    return found


def sky_name(job_id: str) -> str:
    """Return SkyPilot's name of task 4 of a job, which we write as NAME_4."""
    return "-task-".join(job_id.rsplit("_", 1)) if OF_A_SWEEP.search(job_id) else job_id


def jobs_of(ids: Iterable[str], records: Iterable[dict[str, Any]]) -> list[Job]:
    """Return the jobs of these ids, and their tasks, from the records of SkyPilot's queue, the latest first."""
    found: dict[str, Job] = {}
    for record in records:
        name, number = str(record.get("job_name")), ""
        if name not in ids and (task := re.fullmatch(r"(.*)-task-(\d+)", name)):
            name, number = task.groups()
        if name not in ids:
            continue
        job_id = f"{name}_{number}" if number else name
        word = WORDS.get(str(record.get("status")), "FAILED")
        job = Job(job_id, word, int(word == "FAILED"), int(record.get("recovery_count") or 0))
        found.setdefault(job_id, job)
    return list(found.values())
