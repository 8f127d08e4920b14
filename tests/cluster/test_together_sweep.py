"""Sweeps whose trials train together: the same folders, manifest and table; one can be stopped without the others."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from equal_runs import compared_rows, rows
from safetensors.torch import load_file
from test_local_sweep import TINY, has_ended, seen, wait_until

from lightning_peft.__main__ import main
from lightning_peft.cluster.process import LEAVE
from lightning_peft.commands.sweep_array import groups_of_tasks
from lightning_peft.commands.together import train_together
from lightning_peft.commands.train import train
from lightning_peft.compose import compose_config
from lightning_peft.config import TrainConfig
from lightning_peft.sweeps.local_worker import claim
from lightning_peft.sweeps.sweep import Sweep, Trial, read_sweep, write_sweep

SHARDED = ["quantization=nf4", "strategy=fsdp", "trainer.devices=2"]
BASES = [[], pytest.param(SHARDED, marks=pytest.mark.multi_process)]


def sweep_of(folder: Path, bases: list[str | None], together: int) -> Sweep:
    trials = [Trial(f"t{number}", [], base=base) for number, base in enumerate(bases)]
    for trial in trials:
        (folder / trial.name).mkdir()
    sweep = Sweep([], [], "local", "validation_loss", count=len(trials), together=together, trials=trials)
    write_sweep(sweep, folder)
    return sweep


def in_folder(run_dir: Path, other: Path) -> TrainConfig:
    """Return the config of a run, of one that begins in another folder."""
    other.mkdir()
    shutil.copy(run_dir / "config.yaml", other)
    return compose_config("train", [f"config_path={other / 'config.yaml'}"])


def test_worker_claims_trials_of_one_base(tmp_path):
    sweep_of(tmp_path, ["a", None, "b", "a", "a", "b"], together=2)
    (tmp_path / "t0" / LEAVE).touch()  # it is of a start that was killed before it could leave
    claimed = [[trial.name for trial in claim(tmp_path)] for _ in range(4)]
    assert claimed == [["t0", "t3"], ["t1"], ["t2", "t5"], ["t4"]]
    assert all(trial.attempts == 1 for trial in read_sweep(tmp_path).trials)
    assert not (tmp_path / "t0" / LEAVE).exists()


def test_task_of_an_array_takes_trials_of_one_base(tmp_path):
    sweep = sweep_of(tmp_path, ["a", None, "b", "a", "a", "b"], together=2)
    groups = [[trial.name for trial in group] for group in groups_of_tasks(sweep.trials, 2)]
    assert groups == [["t0", "t3"], ["t1"], ["t2", "t5"], ["t4"]]


def test_array_has_a_task_for_each_group(tmp_path, capsys):
    words = ["adapter.rank=2,4,8,16", "method=lora,dora", "sweep.together=3", "cluster.dry_run=true"]
    assert main(["submit", "-m", *TINY, *words, f"sweep_dir={tmp_path}/s"]) == 0
    script = capsys.readouterr()
    assert "--array=0-5" in script.out  # three and one of lora, and each dora by itself
    assert 'train config_path="$run_dir/trials.txt"' in script.out
    assert script.err.count("trains by itself: method=dora: dora is no low-rank product") == 4
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sweep.together=0"], "sweep.together=0: must be a number of at least 1, auto or null"),
        (["sweep.together=many"], "sweep.together=many: must be a number of at least 1, auto or null"),
        (
            ["sweep.together=2", "sweep.search=optuna", "sweep.trials=4"],
            "sweep.together=2 sweep.search=optuna: each trial is drawn from what those before have shown",
        ),
    ],
)
def test_wrong_words_are_one_line(tmp_path, capsys, words, message):
    assert main(["submit", "-m", *TINY, "adapter.rank=2,4", "cluster=local", *words, f"sweep_dir={tmp_path}/s"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("train", ["sweep.parallel=2"], "sweep.parallel=2: train -m takes sweep.together alone"),
        ("train", ["sweep.together=2", "hydra/launcher=joblib"], "hydra/launcher=joblib: sweep.together starts the"),
        ("evaluate", ["sweep.together=2"], "evaluate -m: takes no options of a sweep"),
    ],
)
def test_words_that_are_for_other_commands_are_refused(tmp_path, capsys, command, words, message):
    assert main([command, "-m", "adapter.rank=2,4", *words, f"run_dir={tmp_path}/s"]) == 2
    assert message in capsys.readouterr().err


def test_file_in_place_of_a_trial_is_one_line_before_anything_begins(tmp_path, capsys):
    (tmp_path / "rank4").touch()
    assert main(["train", "-m", *TINY, "adapter.rank=2,4", "sweep.together=2", f"run_dir={tmp_path}"]) == 2
    assert f"error: run_dir={tmp_path}/rank4: {tmp_path}/rank4 is a file; name a folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["rank4"]


@pytest.mark.slow
def test_foreground_sweep_trains_together(tmp_path, capsys):
    folder = tmp_path / "sweep"
    words = ["adapter.rank=2,4", "method=lora,dora", "sweep.together=4", f"run_dir={folder}"]
    assert main(["train", "-m", *TINY, *words]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("trains by itself: method=dora") == 2
    names = {"rank2_methodlora", "rank4_methodlora", "rank2_methoddora", "rank4_methoddora"}
    trials = {trial.name: trial for trial in seen(folder).trials}
    assert {name: trial.state for name, trial in trials.items()} == dict.fromkeys(names, "finished")
    assert "best validation_loss" in shown.out
    assert (folder / "rank2_methodlora" / "log.txt").read_text()


@pytest.mark.multi_process
@pytest.mark.slow
def test_trials_that_leave_their_ranks_end_no_foreground_sweep(tmp_path, capsys):
    """One trial trains by itself, then two in a group, and all pause."""
    folder = tmp_path / "sweep"
    words = ["strategy=ddp", "trainer.devices=2", "pause_at=1", "method=dora,lora,rslora", "sweep.together=2"]
    assert main(["train", "-m", *TINY, *words, f"run_dir={folder}"]) == 75
    assert "shows it again" in capsys.readouterr().out
    assert [(trial.state, trial.exit_code) for trial in seen(folder).trials] == 3 * [("paused", 75)]


@pytest.mark.slow
def test_one_trial_of_a_group_is_cancelled_and_retried(tmp_path):
    folder = tmp_path / "sweep"
    words = ["optimizer.lr=1e-4,1e-3", "trainer.max_steps=60", "sweep.together=2", "cluster=local"]
    assert main(["submit", "-m", *TINY, *words, f"sweep_dir={folder}"]) == 0
    wait_until(folder, lambda sweep: (folder / "lr1e-4" / "metrics.csv").exists())
    processes = {trial.process for trial in read_sweep(folder).trials}
    assert len(processes) == 1 and None not in processes
    assert main(["sweep", "cancel", str(folder), "trials=[lr1e-4]"]) == 0
    ended = wait_until(folder, has_ended)
    assert [trial.state for trial in ended.trials] == ["cancelled", "finished"]
    assert json.loads((folder / "lr1e-4" / "result.json").read_text())["status"] == "preempted"
    assert main(["sweep", "retry", str(folder), "trials=[lr1e-4]"]) == 0
    ended = wait_until(folder, has_ended)
    assert [(trial.state, trial.attempts) for trial in ended.trials] == [("finished", 2), ("finished", 1)]


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES, ids=["alone", "fsdp"])
def test_killed_group_resumes_bit_equal_and_the_others_go_on(tmp_path, base):
    folder = tmp_path / "sweep"
    words = [
        *base,
        "method=lora,rslora,dora", "adapter.dropout=0.1", "trainer.max_steps=60", "checkpoint.every_n_steps=5",
        "logger=csv", "sweep.together=2", "cluster=local",
    ]  # fmt: skip
    assert main(["submit", "-m", *TINY, *words, f"sweep_dir={folder}"]) == 0
    wait_until(folder, lambda sweep: (folder / "methodrslora" / "checkpoints" / "step-00000010.ckpt").exists())
    process = read_sweep(folder).trial("methodlora").process
    assert process is not None and process == read_sweep(folder).trial("methodrslora").process
    os.kill(process.pid, signal.SIGKILL)
    ended = wait_until(folder, has_ended)
    assert [trial.state for trial in ended.trials] == ["failed", "failed", "finished"]
    # A rank may see that the process it was started by is gone, and say that its trial has failed.
    assert all(trial.exit_code in ((-9, 1) if base else (-9,)) for trial in ended.trials[:2])
    assert main(["sweep", "retry", str(folder), "failed=true"]) == 0
    ended = wait_until(folder, has_ended)
    assert [(t.state, t.attempts) for t in ended.trials] == [("finished", 2), ("finished", 2), ("finished", 1)]

    names = ("methodlora", "methodrslora")
    undisturbed = [in_folder(folder / name, tmp_path / name) for name in names]
    assert train_together(undisturbed, tmp_path / "list.txt") == 0
    for name in names:
        assert compared_rows(folder / name) == compared_rows(tmp_path / name)
        found, expected = (
            load_file(run / name / "adapter" / "adapter_model.safetensors") for run in (folder, tmp_path)
        )
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES, ids=["alone", "fsdp"])
def test_group_of_a_pruned_sweep_goes_on_with_those_that_a_rung_lets_on(tmp_path, base):
    folder = tmp_path / "sweep"
    words = [
        *base,
        "optimizer.lr=1e-5,1e-2,1e-6", "trainer.max_steps=8", "sweep.pruning=asha", "sweep.min_steps=3",
        "sweep.reduction=3", "sweep.together=3", "logger=csv", "cluster=local",
    ]  # fmt: skip
    assert main(["submit", "-m", *TINY, *words, f"sweep_dir={folder}"]) == 0
    ended = wait_until(folder, lambda sweep: has_ended(sweep) and any(t.state == "finished" for t in sweep.trials))
    assert [(t.state, t.attempts) for t in ended.trials] == [("paused", 1), ("finished", 2), ("paused", 1)]
    assert len({json.dumps(t.rung_values) for t in ended.trials}) == 3
    assert [int(row["step"]) for row in rows(folder / "lr1e-5") if row["loss"]] == [1, 2, 3]
    config = in_folder(folder / "lr1e-2", tmp_path / "alone")
    assert config.pause_at is None
    train(config)
    for row, expected in zip(rows(folder / "lr1e-2"), rows(tmp_path / "alone"), strict=True):
        for key in ("loss", "validation_loss"):
            assert float(row[key] or 0) == pytest.approx(float(expected[key] or 0), rel=1e-5), row["step"]
