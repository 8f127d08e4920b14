"""`lightning-peft submit`: a training handed to a cluster, to be started again and resumed until it is finished."""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_peft.checkpoint.atomic import atomic_file, write_text
from lightning_peft.cluster.job import ClusterConfig, ClusterError, ClusterSilent, JobSpec
from lightning_peft.cluster.registry import CLUSTERS
from lightning_peft.config import TrainConfig, as_yaml
from lightning_peft.runs.command import kept_commands
from lightning_peft.runs.folder import find_start
from lightning_peft.runs.lock import only_writer
from lightning_peft.strict_json import read_object

logger = logging.getLogger(__name__)

JOB = "job.json"
"""File in a run folder with the job that runs it."""


def submit(config: TrainConfig) -> None:
    """Write config and job into the run folder, submit, print the job's id, and return without waiting.

    Raises ValueError for options that contradict each other, and for a run folder that a job has already.
    """
    cluster = config.cluster
    if cluster is None:
        raise ValueError("cluster=null: submit needs a cluster, as cluster=slurm")
    config = for_cluster(config, cluster)
    assert config.run_dir is not None, "the config composes a run_dir"
    run_dir = Path(config.run_dir)
    kind, work = CLUSTERS[cluster.name].cluster, work_of(config, run_dir)
    kind.check(cluster, work)
    text = kind.text(cluster, work)
    if cluster.dry_run or config.dry_run:
        print(text, end="")
        return
    refuse_second_job(run_dir)  # a job that runs holds the lock, and is named better by its number
    with only_writer(run_dir):  # a second submit, or a run that is in the folder
        if find_start(config, run_dir).result is not None:
            logger.info("%s is finished: nothing left to do", run_dir)
            return
        refuse_second_job(run_dir)
        with nothing_left_if_refused(run_dir):
            write_text(run_dir / "config.yaml", as_yaml(config))
            kept_commands(run_dir)
            write_text(run_dir / kind.file, text)
            job_id = kind.submit(run_dir / kind.file, work)
        with atomic_file(run_dir / JOB) as path:
            path.write_text(json.dumps({"job_id": job_id, "cluster": cluster.name}) + "\n")
    print(f"job {job_id}: {run_dir}")


@contextmanager
def nothing_left_if_refused(folder: Path) -> Iterator[None]:
    """Remove the files that are written inside into a folder, and the folders on the way, if the cluster refuses the
    job or one of them cannot be written."""
    before = set(folder.iterdir()) if folder.exists() else set()
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except ClusterSilent:
        raise
    except (ClusterError, OSError):
        for path in set(folder.iterdir()) - before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in made:
            path.rmdir()
        raise


def for_cluster(config: TrainConfig, cluster: ClusterConfig) -> TrainConfig:
    """Return the config its ranks run: nodes and devices from the cluster, the run folder absolute.

    Raises ValueError where trainer.num_nodes or trainer.devices say something else, or the run could not resume.
    """
    if config.resume == "never":
        raise ValueError("resume=never: a job that the cluster starts again has to go on where it was; leave it out")
    derived: dict[str, Any] = {"num_nodes": cluster.nodes, "devices": cluster.ranks_per_node}
    for key, value in derived.items():
        if (given := config.trainer.get(key, 1)) not in (1, "auto", value):
            source = "cluster.nodes" if key == "num_nodes" else f"cluster.{cluster.ranks_option}"
            raise ValueError(f"trainer.{key}={given} {source}={value}: leave trainer.{key} out, it follows the cluster")
    assert config.run_dir is not None, "the config composes a run_dir"
    run_dir = os.path.abspath(config.run_dir)  # the job may be submitted again from another folder
    config = replace(config, trainer=config.trainer | derived, cluster=None, run_dir=run_dir)
    # This imports Lightning, which the verbs of a sweep do without.
    from lightning_peft.runs.machine import Machine
    from lightning_peft.runs.plan import plan_run

    plan_run(config, Machine.of_cluster(config.trainer, cluster))
    return config


def work_of(config: TrainConfig, run_dir: Path) -> JobSpec:
    """Return the work of a job of one run."""
    return JobSpec(run_dir.name, run_dir.resolve(), os.getcwd(), has_wandb="wandb" in config.logger)


def refuse_second_job(run_dir: Path) -> None:
    """Raise ValueError where a job that is not over has the folder."""
    path = run_dir / JOB
    if not path.exists():
        return
    record = read_object(path, "delete it once the cluster shows no job in this folder")
    job_id, cluster = record["job_id"], CLUSTERS[record.get("cluster", "slurm")].cluster
    if any(job.is_active for job in cluster.find([job_id]).values()):
        raise ValueError(f"run_dir={run_dir}: job {job_id} runs it; {cluster.how_to_cancel(job_id)} ends it")
