"""`train` starts its own ranks, from one file, and ends as they end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rank_runs import TINY, result, rows

from lightning_peft.commands.train import prepare_folder
from lightning_peft.compose import compose_config


def command(*words: str, seconds: int = 400) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "lightning_peft", "train", *words, *TINY, "strategy=ddp", "trainer.devices=2"],
        capture_output=True, text=True, timeout=seconds, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )  # fmt: skip


@pytest.mark.multi_process
@pytest.mark.slow
def test_sweep_starts_the_ranks_of_each_trial_once(tmp_path):
    run = command("-m", "adapter.rank=2,4", "trainer.max_steps=1", f"run_dir={tmp_path}/sweep")
    assert run.returncode == 0, run.stderr[-3000:]
    trials = {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "sweep").glob("*/result.json")}
    assert {name: trial["status"] for name, trial in trials.items()} == {"rank2": "finished", "rank4": "finished"}
    assert trials["rank4"]["trainable_parameters"] == 2 * trials["rank2"]["trainable_parameters"]
    assert yaml.safe_load((tmp_path / "sweep" / "rank4" / "config.yaml").read_text())["adapter"]["rank"] == 4


@pytest.mark.multi_process
@pytest.mark.slow
def test_killed_rank_ends_the_run_with_one_line(tmp_path):
    run = command(f"run_dir={tmp_path}/run", "trainer.max_steps=4", "+callbacks.end._target_=ending.KillRankOne")
    assert run.returncode == 137
    assert [line for line in run.stderr.splitlines() if line.startswith("error:")] == [
        "error: rank 1 was ended by SIGKILL"
    ]


@pytest.mark.multi_process
@pytest.mark.slow
def test_signal_to_the_launcher_saves_on_the_ranks_and_resumes(tmp_path):
    words = [f"run_dir={tmp_path}/run", "trainer.max_steps=4", "resume=auto"]
    stopped = command(*words, "+callbacks.end._target_=ending.SignalLauncher")
    assert stopped.returncode == 75, stopped.stderr[-3000:]
    assert result(tmp_path / "run")["status"] == "preempted"
    assert len(rows(tmp_path / "run")) < 4
    resumed = command(*words)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4]


LAUNCH = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=os.environ | {"LIGHTNING_PEFT_LAUNCHER": str(os.getpid())})
time.sleep(300)
"""
RANK = """
import time
from lightning_peft.runs.ranks import leave_with_launcher
leave_with_launcher()
print("started", flush=True)
time.sleep(300)
"""


@pytest.mark.multi_process
def test_rank_does_not_outlive_a_killed_launcher():
    with subprocess.Popen([sys.executable, "-c", LAUNCH, RANK], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout.readline() == "started\n"
        launcher.kill()
        assert launcher.communicate(timeout=60) == ("", None)  # the pipe closes when the rank, which has it too, ends


def test_config_path_is_the_whole_config(tmp_path):
    config = compose_config("train", ["model=tiny", "adapter.rank=3", f"run_dir={tmp_path}"])
    prepare_folder(config, tmp_path)
    assert compose_config("train", [f"config_path={tmp_path}/config.yaml"]) == config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["config_path=/no/config.yaml"], "config_path=/no/config.yaml: no such file"),
        (["config_path=x", "seed=1"], "config_path=x: only train takes it, with nothing beside it"),
        (["strategy=ddp", "strategy.cpu_offload=true"], "strategy.cpu_offload=true strategy=ddp: .* use strategy=fsdp"),
        (["strategy.tensor_parallel=2"], "strategy.tensor_parallel=2: .* use 1, and strategy=fsdp"),
    ],
)
def test_wrong_options_are_named(words, message):
    with pytest.raises(ValueError, match=message):
        compose_config("train", words)
