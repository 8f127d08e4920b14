"""The command of a run, and the file of one's own that it named, are kept with it."""

import json
import time

import pytest

from lightning_peft.__main__ import main
from lightning_peft.runs.command import kept_commands, started_by

FILE = "model: tiny\ndata: {max_rows: 8, max_validation_rows: 2}\ntrainer: {max_steps: 1}\nvalidation: {samples: 0}\n"


def test_command_and_file_of_a_run_are_in_folder_lineage_and_card(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(FILE)
    words = ["train", "my.yaml", "rank=4", "data.system_prompt=Be brief", "run_dir=run"]
    assert main(words) == 0
    assert main([*words, "trainer.max_steps=2", "resume=auto"]) == 2  # no checkpoint to go on from: no start of it
    line = "lightning-peft train my.yaml rank=4 'data.system_prompt=Be brief' run_dir=run"
    assert (tmp_path / "run" / "command.txt").read_text() == f"{line}\n"
    assert (tmp_path / "run" / "own_files" / "my.yaml").read_text() == FILE
    assert json.loads((tmp_path / "run" / "adapter" / "lineage.json").read_text())["commands"] == [line]
    assert f"\n{line}\n" in (tmp_path / "run" / "adapter" / "README.md").read_text()


def test_word_that_takes_away_is_no_home(tmp_path, monkeypatch):
    """~data is the folder of nobody: expanding it ended the run in a traceback."""
    monkeypatch.chdir(tmp_path)
    for word in ("~data.sources.docs", "~callbacks.mine.yaml"):
        with started_by([word]):
            assert kept_commands(tmp_path / "run")[-1] == f"lightning-peft train '{word}'"


def test_trial_of_a_sweep_has_a_command_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(FILE)
    assert main(["train", "-m", "my.yaml", "adapter.rank=2,4", "run_dir=sweep"]) == 0
    command = (tmp_path / "sweep" / "rank2" / "command.txt").read_text()
    assert "adapter.rank=2 " in command and "trainer.max_steps=1" in command and command.count("\n") == 1
    assert main([*command.split()[1:-1], "run_dir=again"]) == 0
    losses = [json.loads((tmp_path / run / "result.json").read_text()) for run in ("sweep/rank2", "again")]
    assert losses[0]["train_loss"] == losses[1]["train_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train -m", "submit -m cluster=local"])
def test_trials_that_train_together_or_as_jobs_have_commands_too(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(FILE)
    words = [*command.split(), "my.yaml", "adapter.rank=2,4", "sweep.together=2", "run_dir=sweep"]
    assert main(words) == 0
    wait_for(tmp_path / "sweep")
    for rank in (2, 4):
        (line,) = (tmp_path / "sweep" / f"rank{rank}" / "command.txt").read_text().splitlines()
        assert line.startswith("lightning-peft train ") and f"adapter.rank={rank} " in line
        assert line.endswith(f"run_dir={tmp_path}/sweep/rank{rank}") and "trainer.max_steps=1" in line
        lineage = json.loads((tmp_path / "sweep" / f"rank{rank}" / "adapter" / "lineage.json").read_text())
        assert lineage["commands"] == [line]


def wait_for(folder):
    until = time.monotonic() + 120
    while len(list(folder.glob("*/result.json"))) < 2:
        assert time.monotonic() < until
        time.sleep(0.1)


def test_submitted_run_keeps_the_words_of_submit(tmp_path):
    with started_by(["my.yaml", "rank=4"], "submit"):
        assert kept_commands(tmp_path) == ["lightning-peft submit my.yaml rank=4"]
    with started_by([f"config_path={tmp_path}/config.yaml"]):  # the job
        assert kept_commands(tmp_path) == ["lightning-peft submit my.yaml rank=4"]


def test_starts_add_up_and_ranks_add_none(tmp_path):
    with started_by(["rank=4"]):
        assert kept_commands(tmp_path) == kept_commands(tmp_path) == ["lightning-peft train rank=4"]
    with started_by([f"config_path={tmp_path}/config.yaml"]):
        assert kept_commands(tmp_path) == ["lightning-peft train rank=4"]
    with started_by(["rank=4", "resume=auto"]):
        expected = ["lightning-peft train rank=4", "lightning-peft train rank=4 resume=auto"]
        assert kept_commands(tmp_path) == expected
    assert kept_commands(tmp_path) == expected


def test_python_program_has_no_command(tmp_path):
    assert kept_commands(tmp_path) == [] and not list(tmp_path.iterdir())
