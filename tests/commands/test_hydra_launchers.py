"""`train -m` with Hydra's own launchers: trials in other processes, and how the command ends."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import started

TRIAL = [
    "model=tiny", "data.max_rows=8", "data.max_validation_rows=2", "trainer.max_steps=1", "trainer.accelerator=cpu",
    "trainer.precision=32-true", "validation.samples=0",
]  # fmt: skip

PATH = os.pathsep.join([str(Path(__file__).parent.parent / "training"), os.environ.get("PYTHONPATH", "")])


def sweep(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return started.run(
        [*started.COMMAND, "train", "-m", *TRIAL, f"run_dir={folder}", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATH},
    )


def results(folder: Path) -> dict[str, dict[str, object]]:
    return {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/result.json")}


@pytest.fixture
def joblib():
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="pip install 'lightning-peft[joblib]'")


def check_failed_trial(folder: Path, *words: str) -> None:
    """Check two trials of which the first has no data: the second still runs, and the command tells of the first."""
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n} + 1 =", "completion": str(n + 1)}) + "\n" for n in range(12)))
    run = sweep(folder / "sweep", "data=jsonl", f"data.train_path={folder}/missing.jsonl,{rows}", *words)
    assert run.returncode == 2, run.stderr[-3000:]
    errors = [line for line in run.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and f"{folder}/missing.jsonl" in errors[0]
    assert [trial["status"] for trial in results(folder / "sweep").values()] == ["finished"]


@pytest.mark.slow
def test_failed_trial_fails_the_command(tmp_path):
    check_failed_trial(tmp_path)


@pytest.mark.slow
def test_failed_trial_in_another_process_fails_the_command(joblib, tmp_path):
    check_failed_trial(tmp_path, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")


@pytest.mark.slow
def test_crashed_trial_fails_the_command(tmp_path):
    fail = "+callbacks.fail={_target_: signalling.FailAt, micro_batch: 0}"
    run = sweep(tmp_path / "sweep", "adapter.rank=2,4", fail)
    assert run.returncode == 1, run.stderr[-3000:]
    assert {trial["status"] for trial in results(tmp_path / "sweep").values()} == {"failed"}


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("ranks", [[], ["strategy=ddp", "trainer.devices=2"]], ids=["single", "ddp"])
def test_joblib_trains_trials_side_by_side(joblib, tmp_path, ranks):
    words = ["adapter.rank=2,4", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", *ranks]
    run = sweep(tmp_path / "sweep", *words)
    assert run.returncode == 0, run.stderr[-3000:]
    trials = results(tmp_path / "sweep")
    assert {name: trial["status"] for name, trial in trials.items()} == {"rank2": "finished", "rank4": "finished"}
    assert trials["rank4"]["trainable_parameters"] == 2 * trials["rank2"]["trainable_parameters"]


def test_launcher_that_is_not_installed_is_one_line(tmp_path):
    run = sweep(tmp_path / "sweep", "adapter.rank=2,4", "hydra/launcher=ray")
    assert run.returncode == 2
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("error:")]
    assert "hydra/launcher=ray: no such option; hydra/launcher is one of basic" in line
