"""`lightning-peft submit`: a training handed to SLURM, to be requeued and resumed until it is finished."""

import json
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lightning_peft.checkpoint.atomic import atomic_file
from lightning_peft.cluster.slurm import (
    ClusterConfig,
    SlurmError,
    SlurmSilent,
    batch_script,
    find_jobs,
    log_path,
    submit_script,
    train_words,
)
from lightning_peft.config import TrainConfig, plain
from lightning_peft.runs.folder import find_start
from lightning_peft.runs.lock import only_writer

logger = logging.getLogger(__name__)

JOB = "job.json"
"""In a run folder: the job that runs it."""


def submit(config: TrainConfig) -> None:
    """Write config and batch script into the run folder, submit, print the job's id, and return without waiting.

    Raises ValueError for options that contradict each other, and for a run folder that a job has already.
    """
    cluster = config.cluster
    if cluster is None:
        raise ValueError("cluster=null: submit needs a cluster, as cluster=slurm")
    config = for_cluster(config, cluster)
    assert config.run_dir is not None, "the config composes a run_dir"
    run_dir = Path(config.run_dir)
    script = run_script(config, cluster, run_dir)
    if cluster.dry_run:
        print(script, end="")
        return
    refuse_second_job(run_dir)  # a job that runs holds the lock, and is named better by its number
    with only_writer(run_dir):  # a second submit, or a run that is in the folder
        if find_start(config, run_dir).result is not None:
            logger.info("%s is finished: nothing left to do", run_dir)
            return
        refuse_second_job(run_dir)
        with nothing_left_if_refused(run_dir):
            OmegaConf.save(OmegaConf.create(plain(config)), run_dir / "config.yaml")
            (run_dir / "job.sbatch").write_text(script, encoding="utf-8")
            job_id = submit_script(run_dir / "job.sbatch")
        with atomic_file(run_dir / JOB) as path:
            path.write_text(json.dumps({"job_id": job_id}) + "\n")
    print(f"job {job_id}: {run_dir}")


@contextmanager
def nothing_left_if_refused(folder: Path) -> Iterator[None]:
    """Inside, what is written into a folder, and the folders on the way, go again if SLURM refuses the job."""
    before = set(folder.iterdir()) if folder.exists() else set()
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except SlurmSilent:
        raise
    except SlurmError:
        for path in set(folder.iterdir()) - before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in made:
            path.rmdir()
        raise


def for_cluster(config: TrainConfig, cluster: ClusterConfig) -> TrainConfig:
    """The config its ranks run: nodes and devices from the cluster, the run folder absolute.

    Raises ValueError where trainer.num_nodes or trainer.devices say something else, or the run could not resume.
    """
    if config.resume == "never":
        raise ValueError("resume=never: a job that SLURM requeues has to go on where it was; leave it out")
    derived: dict[str, Any] = {"num_nodes": cluster.nodes, "devices": cluster.ranks_per_node}
    for key, value in derived.items():
        if (given := config.trainer.get(key, 1)) not in (1, "auto", value):
            source = "cluster.nodes" if key == "num_nodes" else "cluster.tasks_per_node"
            raise ValueError(f"trainer.{key}={given} {source}={value}: leave trainer.{key} out, it follows the cluster")
    assert config.run_dir is not None, "the config composes a run_dir"
    run_dir = os.path.abspath(config.run_dir)  # the job may be submitted again from another folder
    config = replace(config, trainer=config.trainer | derived, cluster=None, run_dir=run_dir)
    # Lightning, which the verbs of a sweep do without.
    from lightning_peft.runs.machine import Machine
    from lightning_peft.runs.plan import plan_run

    plan_run(config, Machine.of_cluster(config.trainer, cluster))
    return config


def run_script(config: TrainConfig, cluster: ClusterConfig, run_dir: Path) -> str:
    """The batch script of one run, which stands in its folder beside the log."""
    cluster = replace(cluster, python=cluster.python or ("python" if cluster.container else sys.executable))
    return batch_script(
        cluster,
        name=run_dir.name,
        log=log_path(run_dir.resolve(), "slurm-%j.log"),
        train=train_words(run_dir / "config.yaml"),
        run_dir=shlex.quote(str(run_dir.resolve())),
        wandb="wandb" in config.logger,
        directory=os.getcwd(),
    )


def refuse_second_job(run_dir: Path) -> None:
    """Raise ValueError where a job that is not over has the folder."""
    if (job_id := active_job(run_dir)) is not None:
        raise ValueError(f"run_dir={run_dir}: job {job_id} runs it; scancel {job_id} ends it")


def active_job(run_dir: Path) -> str | None:
    """The id of the job that has this run folder and is not over."""
    path = run_dir / JOB
    if not path.exists():
        return None
    job_id = json.loads(path.read_text())["job_id"]
    return job_id if any(job.is_active for job in find_jobs([job_id]).values()) else None
