"""`train -m`: one folder a trial, named by what was swept, inside the sweep's folder."""

import json
import os
import re
import signal

import pytest
import yaml
from lightning.pytorch import Callback

from lightning_peft.__main__ import main
from lightning_peft.sweeps.foreground import enter_trial


@pytest.mark.slow
def test_sweep_trains_every_trial_in_its_own_folder(tmp_path, capsys):
    words = [
        "train", "-m", "model=tiny", "data.max_rows=8", "data.max_validation_rows=2", "trainer.max_steps=1",
        "trainer.accelerator=cpu", f"run_dir={tmp_path}/sweep", "adapter.rank=2,4", "adapter.alpha=8,16",
    ]  # fmt: skip
    assert main(words) == 0
    trials = {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "sweep").glob("*/result.json")}
    assert set(trials) == {"alpha8_rank2", "alpha16_rank2", "alpha8_rank4", "alpha16_rank4"}
    assert all(trial["status"] == "finished" for trial in trials.values())
    config = yaml.safe_load((tmp_path / "sweep" / "alpha16_rank4" / "config.yaml").read_text())
    assert (config["adapter"]["rank"], config["adapter"]["alpha"]) == (4, 16)
    best = min(trials, key=lambda name: trials[name]["validation_loss"])
    assert f"of {best}" in capsys.readouterr().out
    assert main(["sweep", "table", f"{tmp_path}/sweep", f"output_path={tmp_path}/table.json"]) == 0
    rows = json.loads((tmp_path / "table.json").read_text())
    assert [row["trial"] for row in rows] == sorted(trials, key=lambda name: trials[name]["validation_loss"])
    assert {(row["rank"], row["alpha"]) for row in rows} == {(2, 8), (2, 16), (4, 8), (4, 16)}
    assert main(["merge", f"{tmp_path}/sweep", f"output={tmp_path}/merged"]) == 0
    assert f"adapter_path={tmp_path}/sweep/{best}: the trial whose validation_loss is best" in capsys.readouterr().err
    assert main(["sweep", "retry", f"{tmp_path}/sweep", "failed=true"]) == 2
    assert "run_dir" in capsys.readouterr().err
    again = [*words[:-2], "adapter.rank=2,4", "adapter.alpha=8,16", "resume=auto"]
    assert main(again) == 0
    manifest = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [trial["attempts"] for trial in manifest["trials"]] == [2] * 4


@pytest.mark.slow
def test_sweep_over_an_unknown_option_is_wrong_input(tmp_path, capsys):
    assert main(["train", "-m", "model=tiny", f"run_dir={tmp_path}", "adapter.rnk=2,4"]) == 2


@pytest.mark.parametrize(
    ("words", "ranks", "message"),
    [
        (["adapter.rank=2,4"], "2", "-m under torchrun or srun: every rank would run a sweep of its own"),
        (
            ["adapter.rank=2,4", "hydra/sweeper=optuna", "strategy=ddp", "trainer.devices=2"],
            "1",
            "hydra/sweeper=optuna trainer.devices=2: in one process the ranks could be given different trials",
        ),
    ],
)
def test_sweep_that_would_differ_between_ranks_is_refused(monkeypatch, capsys, tmp_path, words, ranks, message):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", ranks)
    assert main(["train", "-m", "model=tiny", f"run_dir={tmp_path}/sweep", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


@pytest.fixture
def foreground(tmp_path):
    """Return the folder of a sweep over rank that train -m has begun."""
    for rank in (2, 4):
        (tmp_path / f"rank{rank}").mkdir()
        enter_trial(tmp_path / f"rank{rank}", ["model=tiny", f"adapter.rank={rank}"], ["adapter.rank=2,4"])
        result = {"status": "finished", "validation_loss": float(rank), "trainable_parameters": rank}
        (tmp_path / f"rank{rank}" / "result.json").write_text(json.dumps(result))
    return tmp_path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["optimizer.lr=0.1,0.2"],
            "holds a sweep over adapter.rank, this one is over optimizer.lr; name another",
        ),
        (["adapter.rank=8,16", "seed=0,1"], "holds a sweep over adapter.rank, this one is over adapter.rank, seed"),
    ],
)
def test_folder_of_another_sweep_is_refused(foreground, words, message, capsys):
    before = (foreground / "sweep.json").read_text()
    assert main(["train", "-m", "model=tiny", f"run_dir={foreground}", *words]) == 2
    assert f"run_dir={foreground}: {message}" in capsys.readouterr().err
    assert (foreground / "sweep.json").read_text() == before


def test_folder_of_submit_is_no_folder_of_train(foreground, capsys):
    manifest = json.loads((foreground / "sweep.json").read_text()) | {"cluster": "local"}
    (foreground / "sweep.json").write_text(json.dumps(manifest))
    assert main(["train", "-m", "model=tiny", f"run_dir={foreground}", "adapter.rank=2,4"]) == 2
    assert "holds a sweep of submit -m" in capsys.readouterr().err


def test_values_are_added_to_a_sweep_and_the_next_one_is_of_its_kind(foreground, capsys):
    (foreground / "rank8").mkdir()
    enter_trial(foreground / "rank8", ["model=tiny", "adapter.rank=8"], ["adapter.rank=8,16"])
    assert json.loads((foreground / "sweep.json").read_text())["swept"] == ["adapter.rank=2,4,8"]
    assert main(["sweep", "table", str(foreground)]) == 0
    command = f"next: lightning-peft train -m model=tiny adapter.rank=2,4 seed=0,1,2 run_dir={foreground}-next"
    assert command in capsys.readouterr().out.replace("\n", " ")


class PressCtrlC(Callback):
    """Ctrl-C in the middle of the first trial."""

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)


TRIALS = [
    "train", "-m", "model=tiny", "data.max_rows=8", "data.max_validation_rows=2", "trainer.max_steps=4",
    "trainer.accelerator=cpu", "validation.samples=0", "adapter.rank=2,4,8",
]  # fmt: skip


def test_ctrl_c_of_a_sweep_says_what_is_left_of_it(tmp_path, capsys):
    folder = tmp_path / "sweep"
    assert main([*TRIALS, f"callbacks.c._target_={__name__}.PressCtrlC", f"run_dir={folder}"]) == 130
    out, err = capsys.readouterr()
    assert re.search(r"rank2\s+interrupted", out) and "running" not in out
    assert f"1 of 3 trials have begun; the same command with run_dir={folder} resume=auto goes on" in out
    assert re.search(rf"saved after step \d; the same command with run_dir={folder} resume=auto goes on", err)


def test_lines_of_a_sweep_are_those_of_a_run(tmp_path, capsys):
    assert main([*TRIALS[:-1], "adapter.rank=2,4", "trainer.max_steps=1", f"run_dir={tmp_path}/sweep"]) == 0
    out, err = capsys.readouterr()
    assert [line for line in err.splitlines() if line.startswith("trial ")] == [
        "trial 1: adapter.rank=2",
        "trial 2: adapter.rank=4",
    ]
    lines = (out + err).splitlines()
    assert not [line for line in lines if "[INFO]" in line or "HYDRA" in line or "hydra" in line]
    assert "training data: packed rows are" in err and "trials have begun" not in out
