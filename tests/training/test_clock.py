"""A clock that is set back and forth by hours while a run trains: nothing is lost, and no time is made up."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import started
from equal_runs import assert_equal_runs
from tiny_runs import TINY, tiny_config

from lightning_peft.commands.train import train

RUN = [
    *TINY, "trainer.max_steps=20", "trainer.max_epochs=4", "checkpoint.every_n_steps=4", "validation.every_n_steps=5",
    "validation.samples=1", "validation.max_new_tokens=8", "guard.action=rollback", "trainer.max_time=00:01:00:00",
    "validation.budget=0.5", "logger=[csv,tensorboard]", "resume=auto",
]  # fmt: skip
JUMP = 3 * 3600


@pytest.fixture(scope="module")
def jumping_clock(tmp_path_factory):
    """Return the environment of a process whose clock of the day jumps by three hours each fifth of a second."""
    if (compiler := shutil.which("gcc")) is None:
        pytest.skip("a clock that jumps needs gcc")
    library = tmp_path_factory.mktemp("clock") / "jumping_clock.so"
    source = Path(__file__).with_name("jumping_clock.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    variables = {"LD_PRELOAD": str(library), "CLOCK_PERIOD": "0.8", "CLOCK_JUMP": str(JUMP)}
    look = "import time; print(max(abs(time.time() - (time.sleep(.05) or time.time())) for _ in range(20)) > 3600)"
    seen = subprocess.run([sys.executable, "-c", look], env=os.environ | variables, capture_output=True, text=True)
    assert seen.stdout == "True\n", seen.stderr
    return os.environ | variables


@pytest.mark.slow
def test_clock_that_jumps_by_hours_changes_nothing(tmp_path, jumping_clock):
    words = [*started.COMMAND, "train", *RUN, f"run_dir={tmp_path / 'jumping'}"]
    done = started.run([*words, "pause_at=9"], env=jumping_clock)
    assert done.returncode == 75 and "pause_at: saved after step 9" in done.stderr
    again = started.run(words, env=jumping_clock)
    assert again.returncode == 0, again.stderr
    train(tiny_config(tmp_path / "steady", *RUN[len(TINY) :]))
    assert_equal_runs(tmp_path / "jumping", tmp_path / "steady")
    answers = [(tmp_path / run / "samples.jsonl").read_text() for run in ("jumping", "steady")]
    assert answers[0] == answers[1]
    rows = list(csv.DictReader((tmp_path / "jumping/metrics.csv").read_text().splitlines()))
    assert all(0 < float(row["step_seconds"]) < 60 for row in rows if row["step_seconds"])
    assert all(float(row["tokens_per_second"]) > 10 for row in rows if row["tokens_per_second"])
    result = json.loads((tmp_path / "jumping/result.json").read_text())
    assert 0 < result["seconds"] < 600 and 0 < result["device_hours"] < 1 and result["tokens_per_second"] > 10
    said = done.stderr + again.stderr + again.stdout
    times = re.findall(r"(-?\d+ (?:h|min)\b)", said)
    assert not [found for found in times if found.startswith("-") or " h" in found], said
