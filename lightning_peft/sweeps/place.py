"""Where the jobs of a sweep are, and what is known there of them."""

from lightning_peft.cluster.job import Cluster, Job
from lightning_peft.cluster.registry import CLUSTERS
from lightning_peft.sweeps.sweep import Sweep


def cluster_of(sweep: Sweep) -> Cluster:
    """Return the cluster that has a sweep's jobs."""
    return CLUSTERS[sweep.cluster].cluster


def find_jobs(sweep: Sweep) -> dict[str, Job]:
    """Return the tasks of a sweep's jobs, by id; empty for a sweep of this machine."""
    return cluster_of(sweep).find(sweep.arrays) if sweep.arrays else {}
