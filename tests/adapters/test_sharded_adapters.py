"""Every method on a model that FSDP2 shards over two processes, dense and NF4."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from adapter_models import WRAPPING


@pytest.mark.multi_process
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_sharded_training_equals_training_whole(base: str) -> None:
    script = Path(__file__).with_name("sharded_adapters.py")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
        base,
    ]

    run = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )

    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.splitlines() == [f"{method} equal" for method in WRAPPING]
