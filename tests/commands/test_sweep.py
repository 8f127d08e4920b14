"""`train -m`: one folder a trial, named by what was swept, inside the sweep's folder."""

import json

import pytest
import yaml

from lightning_peft.__main__ import main


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
