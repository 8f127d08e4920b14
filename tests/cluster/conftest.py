"""The SLURM that the tests of this folder submit to."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, why_not


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """Yield a running cluster of two nodes that the SLURM commands of this process talk to."""
    if reason := why_not():
        pytest.skip(reason)
    # Not under pytest's folder, which is its owner's alone: munged wants a socket that everybody can reach.
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        Path(folder).chmod(0o755)
        cluster = SlurmCluster(Path(folder))
        for key in ("PATH", "SLURM_CONF"):
            patch.setitem(os.environ, key, cluster.environment[key])
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()
