"""Sweeps whose trials train together: the same folders, manifest and table; one can be stopped without the others."""

import json
from pathlib import Path

import pytest
from test_local_sweep import TINY, has_ended, seen, wait_until

from lightning_peft.__main__ import main
from lightning_peft.commands.sweep_array import groups_of_tasks
from lightning_peft.sweeps.local_worker import claim
from lightning_peft.sweeps.sweep import Sweep, Trial, read_sweep, write_sweep


def sweep_of(folder: Path, bases: list[str | None], together: int) -> Sweep:
    trials = [Trial(f"t{number}", [], base=base) for number, base in enumerate(bases)]
    for trial in trials:
        (folder / trial.name).mkdir()
    sweep = Sweep([], [], "local", "validation_loss", count=len(trials), together=together, trials=trials)
    write_sweep(sweep, folder)
    return sweep


def test_worker_claims_trials_of_one_base(tmp_path):
    sweep_of(tmp_path, ["a", None, "b", "a", "a", "b"], together=2)
    claimed = [[trial.name for trial in claim(tmp_path)] for _ in range(4)]
    assert claimed == [["t0", "t3"], ["t1"], ["t2", "t5"], ["t4"]]
    assert all(trial.attempts == 1 for trial in read_sweep(tmp_path).trials)


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
