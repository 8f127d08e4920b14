"""The YAML that clusters take, with scripts as blocks that a person can read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_peft.cluster.job import ClusterConfig, Work


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as a block."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def yaml_text(*documents: Mapping[str, Any]) -> str:
    return "---\n".join(yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=10_000) for document in documents)


def check_is_shared(volumes: Mapping[str, str], work_folder: Path, cluster: str) -> None:
    """Raise ValueError where a run's folder does not stand in a volume, or this machine cannot see the volume.

    `volumes` has paths as keys, the same here and where the run will be.
    """
    place = next((path for path in volumes if work_folder.is_relative_to(path)), None)
    if place is None:
        raise ValueError(
            f"run_dir={work_folder}: cluster={cluster} keeps runs in a volume; give a folder below one of "
            f"cluster.volumes={dict(volumes) or '{}'}, as cluster.volumes={{{work_folder.parent}: NAME}}"
        )
    if not Path(place).is_dir():
        raise ValueError(
            f"cluster.volumes: {place} is no folder of this machine; mount the volume here too, under the same path, "
            "so that configs get there and results are seen"
        )


def check_draws_nothing(config: ClusterConfig, work: Work) -> None:
    """Raise ValueError for tasks that would draw their trials: they cannot ask the cluster how the others stand."""
    if work.is_asking:
        raise ValueError(
            f"sweep.search=optuna cluster={config.name}: a trial is drawn from how the others ended, which its task "
            "cannot ask there; use grid or random, or cluster=slurm or local"
        )
