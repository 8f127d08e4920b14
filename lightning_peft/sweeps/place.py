"""The place of a sweep's jobs, and what is known there of them."""

from pathlib import Path

from lightning_peft.cluster.job import Cluster, Job, own_task
from lightning_peft.cluster.registry import CLUSTERS
from lightning_peft.sweeps.sweep import Sweep


def cluster_of(sweep: Sweep) -> Cluster:
    """Return the cluster that has a sweep's jobs."""
    return CLUSTERS[sweep.cluster].cluster


def find_jobs(sweep: Sweep) -> dict[str, Job]:
    """Return the tasks of a sweep's jobs, by id, those that the queue has dropped too; empty on this machine."""
    if not sweep.arrays:
        return {}
    cluster = cluster_of(sweep)
    found = cluster.find(sweep.arrays)
    tasks = [trial.job for trial in sweep.trials if trial.job is not None]
    return found | (cluster.recall(tasks, found, Path(sweep.folder)) if sweep.folder is not None else {})


def task_of(sweep: Sweep) -> str | None:
    """Return the id of the sweep's task that this process runs in; None elsewhere.

    A sweep of this machine has none, also where it was started inside a job array.
    """
    return own_task() if sweep.cluster in CLUSTERS else None
