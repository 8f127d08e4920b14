"""Rows, layers and metrics of a sweep's trials are looked at before the first of them begins."""

import json

import pytest

from lightning_peft.__main__ import main
from lightning_peft.commands import plan_sweep

STARTS = [
    ["submit", "-m", "cluster=local", "sweep_dir=sweep"],
    ["submit", "-m", "cluster=slurm", "sweep_dir=sweep"],
    ["train", "-m", "run_dir=sweep"],
    ["train", "-m", "sweep.together=2", "run_dir=sweep"],
]
LONG = "word " * 1000


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{n} + 1", "completion": str(n + 1)} for n in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["model=tiny", "data=rows.jsonl", "trainer.max_steps=1", "trainer.accelerator=cpu"]


@pytest.mark.parametrize("start", STARTS, ids=["local", "slurm", "train", "together"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([f"data.system_prompt=short,'{LONG}'"], "expected an answer that begins before data.max_length"),
        (["adapter.target_modules=[q_proj],[nowhere]"], "nowhere"),
        (["adapter.rank=2,4", "validation.metrics=[nowhere:f]"], "validation.metrics=nowhere:f: cannot be imported"),
        (["adapter.rank=2,4", "validation.metrics=[execution_accuracy]"], "needs the columns schema, seed, level"),
    ],
)
def test_what_a_trial_would_be_refused_for_is_said_before_the_first_begins(
    rows, start, words, message, tmp_path, capsys
):
    assert main([*start, *rows, *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("sweep/*/*")), "no trial has begun"


def test_sound_rows_are_begun_on(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(plan_sweep, "start", lambda *of: None)
    assert main([*STARTS[0], *rows, "data.system_prompt=short,'another one'"]) == 0
    assert len(list(tmp_path.glob("sweep/*/config.yaml"))) == 2


def test_rows_that_are_not_there_yet_are_said_and_left_to_their_trial(rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan_sweep, "start", lambda *of: None)
    words = [word for word in rows if not word.startswith("data=")]
    assert main([*STARTS[0], *words, "data=jsonl", "data.train_path=rows.jsonl,later.jsonl"]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "later.jsonl" in line]
    assert "there is no such file" in line and line.endswith("unless it is there when the trial begins")
    assert len(list(tmp_path.glob("sweep/*/config.yaml"))) == 2


def test_sweep_whose_trials_have_finished_asks_for_no_rows(rows, tmp_path):
    words = ["train", "-m", "run_dir=sweep", "resume=auto", *rows, "adapter.rank=2,4"]
    assert main(words) == 0
    (tmp_path / "rows.jsonl").unlink()
    assert main(words) == 0


def test_model_that_only_a_node_has_is_left_to_the_trial(rows, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(plan_sweep, "start", lambda *of: None)
    words = [*rows[1:], "model=hf", "model.path=/scratch/node/model", "adapter.rank=2,4"]
    assert main(["submit", "-m", "cluster=local", "sweep_dir=local", *words]) == 2
    assert "model.path=/scratch/node/model: no such file or folder" in capsys.readouterr().err
    assert main([*STARTS[1], *words]) == 0
    assert (
        "model.path=/scratch/node/model: no such file or folder: a trial that needs it fails" in capsys.readouterr().err
    )
    assert len(list(tmp_path.glob("sweep/*/config.yaml"))) == 2
