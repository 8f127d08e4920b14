"""`train` starts its own ranks, from one file, and ends as they end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from rank_runs import TINY, result, rows
from started import COMMAND, Started, run

from lightning_peft.commands.training import prepare_folder
from lightning_peft.compose import compose_config
from lightning_peft.training.signal_watch import HANG_SECONDS

PATH = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
TRAIN = [*COMMAND, "train", *TINY, "strategy=ddp", "trainer.devices=2"]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATH}


def command(*words: str, seconds: int = 400) -> subprocess.CompletedProcess[str]:
    return run([*TRAIN, *words], timeout=seconds, env=environment())


def error_lines(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("error:")]


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
    assert error_lines(run.stderr) == ["error: rank 1 was ended by SIGKILL"]
    assert "Traceback" not in run.stderr and result(tmp_path / "run")["status"] == "failed"


@pytest.mark.multi_process
@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "status", "line"),
    [
        ("raise", 1, "error: rank 1: RuntimeError: the callback broke"),
        ("3", 3, "error: rank 1 ended with exit status 3"),
        ("0", 1, "error: rank 1 left before the end of the training, with exit status 0"),
    ],
)
def test_last_words_are_those_of_the_rank_that_was_first(tmp_path, how, status, line):
    words = ["+callbacks.end._target_=ending.RankOneEnds", f"+callbacks.end.how='{how}'"]
    run = command(f"run_dir={tmp_path}/run", "trainer.max_steps=4", *words)
    assert (run.returncode, error_lines(run.stderr)) == (status, [line])
    assert run.stderr.count("Traceback") == (how == "raise") and "gloo" not in run.stderr
    assert run.stderr.rstrip().endswith(line)


@pytest.mark.multi_process
@pytest.mark.slow
def test_signal_ends_a_run_one_of_whose_ranks_hangs(tmp_path):
    words = ["+callbacks.end._target_=ending.RankOneEnds", "+callbacks.end.how=sleep"]
    launcher = Started(
        [*TRAIN, f"run_dir={tmp_path}", "trainer.max_steps=4", *words], stderr=subprocess.PIPE, env=environment()
    )
    while not (tmp_path / "asleep").exists():
        assert launcher.poll() is None
        time.sleep(0.1)
    launcher.send_signal(signal.SIGTERM)
    _, messages = launcher.communicate(timeout=HANG_SECONDS + 60)
    assert launcher.returncode == 75
    assert b"another rank may hang or be missing: leaving at once" in messages


@pytest.mark.multi_process
@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signal_ends_a_rank_that_waits_for_others(tmp_path, number, status):
    alone = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    rank = subprocess.Popen(
        [*TRAIN, f"run_dir={tmp_path}"], stderr=subprocess.PIPE, text=True, env=environment() | alone,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert "rank 0 of 2 waits for the others, who meet at 127.0.0.1:" in next(iter(rank.stderr))
    rank.send_signal(number)
    rank.communicate(timeout=20)
    assert rank.returncode == status


@pytest.mark.multi_process
@pytest.mark.slow
def test_ignored_hangup_spares_the_ranks(tmp_path):
    words = ["+callbacks.end._target_=ending.SignalLauncher", "+callbacks.end.name=SIGHUP"]
    run = subprocess.run(
        ["nohup", *TRAIN, f"run_dir={tmp_path}/run", "trainer.max_steps=3", *words],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=400, env=environment(),
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert result(tmp_path / "run")["steps"] == 3


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
        (["config_path=x", "seed=1"], "config_path=x: only train takes it, with nothing but resume="),
        (["strategy=ddp", "strategy.cpu_offload=true"], "strategy.cpu_offload=true strategy=ddp: .* use strategy=fsdp"),
        (["strategy.tensor_parallel=2"], "strategy.tensor_parallel=2: .* use 1, and strategy=fsdp"),
    ],
)
def test_wrong_options_are_named(words, message):
    with pytest.raises(ValueError, match=message):
        compose_config("train", words)
