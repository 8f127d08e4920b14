"""A run killed with SIGKILL and started again ends with the weights of one that was never stopped."""

import csv
import json
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from started import COMMAND, Started
from tiny_runs import TINY, tiny_config

from lightning_peft.__main__ import main
from lightning_peft.commands.train import train

RUN = [
    "trainer.max_epochs=2", "checkpoint.every_n_steps=2", "adapter.dropout=0.1", "trainer.max_steps=12",
    "trainer.accumulate_grad_batches=2", "resume=auto",
]  # fmt: skip


def rows(run_dir: Path) -> list[dict[str, str]]:
    path = run_dir / "metrics.csv"
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def start_and_kill(run_dir: Path, after_steps: int, *overrides: str) -> None:
    """Start the command line and SIGKILL it once it has logged so many steps."""
    command = [*COMMAND, "train", *TINY, *RUN, f"run_dir={run_dir}", *overrides]
    messages = run_dir.with_name("messages.txt")
    with messages.open("w") as file:
        process = Started(command, stdout=file, stderr=file)
    deadline = time.monotonic() + 120
    while len(rows(run_dir)) < after_steps:
        assert process.poll() is None, messages.read_text()
        assert time.monotonic() < deadline, "the run did not reach the step in two minutes"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def assert_equal_runs(resumed: Path, undisturbed: Path) -> None:
    name = "adapter/adapter_model.safetensors"
    ours, expected = load_file(resumed / name), load_file(undisturbed / name)
    assert ours.keys() == expected.keys()
    assert all((ours[key] == expected[key]).all() for key in expected)
    steps = [int(row["step"]) for row in rows(resumed) if row["loss"]]
    assert steps == list(range(1, 13))
    assert [r["loss"] for r in rows(resumed)] == [r["loss"] for r in rows(undisturbed)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    train(tiny_config(run_dir, *RUN))
    return run_dir


@pytest.mark.slow
def test_killed_run_resumes_bit_equal(tmp_path, undisturbed):
    start_and_kill(tmp_path / "run", after_steps=5)
    assert not (tmp_path / "run" / "result.json").exists()
    train(tiny_config(tmp_path / "run", *RUN))
    assert_equal_runs(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_kills_at_many_steps_lose_nothing(tmp_path, undisturbed):
    for step in (1, 3, 6, 7, 10):
        start_and_kill(tmp_path / "run", step)
    train(tiny_config(tmp_path / "run", *RUN))
    assert_equal_runs(tmp_path / "run", undisturbed)


@pytest.mark.parametrize(("micro_batch", "interval"), [(8, 2), (22, 5)], ids=["checkpoint", "adapter"])
def test_run_whose_folder_is_moved_goes_on_from_where_it_is_now(tmp_path, undisturbed, capsys, micro_batch, interval):
    """The first thing that it saves afterwards is a checkpoint, or the adapter."""
    move = f"+callbacks.move={{_target_: signalling.MoveAt, micro_batch: {micro_batch}, to: {tmp_path / 'moved'}}}"
    words = [*TINY, *RUN, f"run_dir={tmp_path / 'run'}"]
    assert main(["train", *words, move, f"checkpoint.every_n_steps={interval}"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: run_dir={tmp_path / 'run'}: was moved or removed while this process wrote it")
    assert not (tmp_path / "run").exists()
    train(tiny_config(tmp_path / "moved", *RUN))
    assert_equal_runs(tmp_path / "moved", undisturbed)


def test_answers_of_a_resumed_run_are_those_of_one_that_was_never_stopped(tmp_path):
    """The validation behind step 3 is taken twice, as the last checkpoint is of step 2."""
    run = [*RUN, "validation.every_n_steps=3", "validation.samples=2", "trainer.max_steps=5"]
    train(tiny_config(tmp_path / "whole", *run))
    with pytest.raises(RuntimeError, match="micro batch 7"):
        train(tiny_config(tmp_path / "run", *run, "+callbacks.fail={_target_: signalling.FailAt, micro_batch: 7}"))
    samples = tmp_path / "run" / "samples.jsonl"
    assert len(samples.read_text().splitlines()) == 2
    samples.write_text(samples.read_text() + '{"step": 3, "prom')
    train(tiny_config(tmp_path / "run", *run))
    assert samples.read_text() == (tmp_path / "whole" / "samples.jsonl").read_text()


def test_finished_run_is_not_run_again(undisturbed):
    before = (undisturbed / "result.json").read_text()
    assert train(tiny_config(undisturbed, *RUN)) == json.loads(before)
    assert (undisturbed / "result.json").read_text() == before


def test_changed_config_is_refused_on_resume(undisturbed):
    with pytest.raises(ValueError, match=r"optimizer\.lr \(was 0\.01, is 0\.02\)"):
        train(tiny_config(undisturbed, *RUN, "optimizer.lr=0.02"))


def test_used_run_dir_is_refused_without_resume(undisturbed):
    with pytest.raises(ValueError, match="holds a run already: resume=auto continues it"):
        train(tiny_config(undisturbed, *RUN, "resume=never"))


def test_longer_run_goes_on_from_the_last_checkpoint(tmp_path, undisturbed):
    run = [*RUN[:-1], "resume=auto", "schedule=constant", "schedule.warmup_steps=0"]
    train(tiny_config(tmp_path / "long", *run, "trainer.max_steps=8"))
    train(tiny_config(tmp_path / "short", *run, "trainer.max_steps=4"))
    result = train(tiny_config(tmp_path / "short", *run, "trainer.max_steps=8"))
    assert result["steps"] == 8
    name = "adapter/adapter_model.safetensors"
    short, long = (load_file(tmp_path / run / name) for run in ("short", "long"))
    assert all((short[key] == long[key]).all() for key in long)
