"""The table of clusters: the options of each, and the class that handles its jobs."""

from dataclasses import dataclass

from lightning_peft.cluster.job import Cluster, ClusterConfig
from lightning_peft.cluster.kubernetes import Kubernetes, KubernetesConfig
from lightning_peft.cluster.skypilot import SkyPilot, SkyPilotConfig
from lightning_peft.cluster.slurm import Slurm, SlurmConfig


@dataclass(frozen=True)
class ClusterRow:
    """A kind of cluster."""

    config: type[ClusterConfig]
    cluster: Cluster


CLUSTERS: dict[str, ClusterRow] = {
    "slurm": ClusterRow(SlurmConfig, Slurm()),
    "kubernetes": ClusterRow(KubernetesConfig, Kubernetes()),
    "skypilot": ClusterRow(SkyPilotConfig, SkyPilot()),
}
"""Name, as in cluster=slurm, -> row."""
