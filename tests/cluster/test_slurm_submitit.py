"""`train -m` with Hydra's submitit launcher: its trials are tasks of a job array of a real SLURM."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_local_sweep import TINY

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
REPOSITORY = Path(__file__).parent.parent.parent


@pytest.fixture
def submitit():
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="pip install 'lightning-peft[submitit]'")


def sweep(folder: Path, *words: str) -> tuple[subprocess.CompletedProcess[str], dict[str, dict[str, object]], str]:
    """Run the command; return how it ended, the results by trial, and the trials' logs."""
    run = subprocess.run(
        [
            sys.executable, "-m", "lightning_peft", "train", "-m", *TINY, "hydra/launcher=submitit_slurm",
            f"run_dir={folder}", *words,
        ],
        capture_output=True, text=True, timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    results = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/result.json")}
    return run, results, "\n".join(path.read_text() for path in folder.glob(".submitit/*/*log.err"))


def test_trials_of_submitit_train_on_their_ranks_and_one_that_fails_fails_the_command(slurm, submitit, tmp_path):
    """SLURM itself shows such a job as COMPLETED."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n} + 1 =", "completion": str(n + 1)}) + "\n" for n in range(12)))
    words = ["data=jsonl", f"data.train_path={tmp_path}/missing.jsonl,{rows}", "strategy=ddp", "trainer.devices=2"]
    run, trials, logs = sweep(tmp_path / "sweep", "hydra.launcher.tasks_per_node=2", *words)
    assert run.returncode != 0 and "missing.jsonl" in run.stderr, logs[-3000:]
    (trial,) = trials.values()
    assert trial["status"] == "finished"
    assert trial["device_hours"] == pytest.approx(2 * trial["seconds"] / 3600)
