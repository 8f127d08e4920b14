"""The SLURM that the tests of this folder submit to."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, why_not


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """Yield a running cluster of two nodes that the SLURM commands of this process talk to."""
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def accounted_slurm() -> Iterator[SlurmCluster]:
    """Yield another one, which the commands talk to for a module: it keeps accounts, and soon forgets jobs."""
    with running_cluster(has_accounting=True) as cluster:
        yield cluster


@contextmanager
def running_cluster(has_accounting: bool = False) -> Iterator[SlurmCluster]:
    if reason := why_not(has_accounting):
        pytest.skip(reason)
    # Not under pytest's folder, which is its owner's alone: munged wants a socket that everybody can reach.
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        Path(folder).chmod(0o755)
        cluster = SlurmCluster(Path(folder), has_accounting)
        for key in ("PATH", "SLURM_CONF"):
            patch.setitem(os.environ, key, cluster.environment[key])
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()
