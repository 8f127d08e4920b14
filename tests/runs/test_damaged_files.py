"""Files beside the checkpoints that a crash, a full disk or a hand has damaged: a run goes on, or one line says why."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_runs import tiny_config

from lightning_peft.__main__ import main
from lightning_peft.checkpoint.model_card import write_card
from lightning_peft.commands.train import train
from lightning_peft.sweeps.budget import logged_hours
from lightning_peft.sweeps.sweep import Sweep, Trial, read_result, write_sweep
from lightning_peft.tracking.service_record import service_record, write_record

WORDS = ["trainer.max_steps=4", "checkpoint.every_n_steps=1", "validation.every_n_steps=2", "validation.samples=0"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Return `whole`, which finished, and `paused`, which is to go on."""
    folder = tmp_path_factory.mktemp("runs")
    train(tiny_config(folder / "whole", *WORDS))
    with pytest.raises(SystemExit):
        train(tiny_config(folder / "paused", *WORDS, "pause_at=2"))
    return folder


def damaged(runs: Path, name: str, to: Path, file: str, content: bytes | None) -> Path:
    """Return a copy of a run with a file cut short (None), or with other content."""
    run_dir = to / "run"
    shutil.copytree(runs / name, run_dir)
    path = run_dir / file
    path.write_bytes(path.read_bytes()[:20] if content is None else content)
    return run_dir


def steps_of(run_dir: Path) -> list[str]:
    with (run_dir / "metrics.csv").open() as file:
        return [row["step"] for row in csv.DictReader(file) if row["loss"]]


@pytest.mark.parametrize(
    ("name", "file", "content"),
    [
        ("paused", "result.json", None),
        ("paused", "result.json", b"null"),
        ("whole", "result.json", b""),
        ("whole", "result.json", b"{}"),
        ("paused", "checkpoints/best.json", None),
        ("paused", "checkpoints/best.json", b""),
    ],
)
def test_what_is_written_again_stops_nothing(runs, tmp_path, name, file, content):
    run_dir = damaged(runs, name, tmp_path, file, content)
    result = train(tiny_config(run_dir, *WORDS, "resume=auto"))
    assert (result["status"], result["steps"]) == ("finished", 4)
    one, other = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (run_dir, runs / "whole"))
    assert all(one[key].equal(other[key]) for key in other)
    assert json.loads((run_dir / "result.json").read_text())["validation_loss"] == result["validation_loss"]


@pytest.mark.parametrize("rest", [b"3,5.1,0.", b"\0" * 50, b"\xff\xfe\n"])
def test_end_of_metrics_that_a_crash_left_is_cut(runs, tmp_path, rest):
    text = (runs / "paused" / "metrics.csv").read_bytes() + rest
    run_dir = damaged(runs, "paused", tmp_path, "metrics.csv", text)
    assert main(["report", str(run_dir)]) == 0
    assert logged_hours(Sweep([], [], "local", "loss"), Trial("run", []), run_dir) > 0
    train(tiny_config(run_dir, *WORDS, "resume=auto"))
    assert steps_of(run_dir) == ["1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.yaml", None, "config.yaml: damaged .*cannot be compared .*bring it back"),
        ("config.yaml", b"{a: [b", "config.yaml: damaged .while parsing"),
        ("config.yaml", b"\xff\xfe\0", "config.yaml: damaged .*can't decode"),
        ("rollbacks.json", b"{", "rollbacks.json: damaged .*delete it to take the one given"),
        ("rollbacks.json", b'[{"step": 1}]', "rollbacks.json: damaged"),
    ],
)
def test_what_decides_the_run_is_named(runs, tmp_path, file, content, message):
    if not (runs / "paused" / file).exists():
        (runs / "paused" / file).write_bytes(b"[]")
    run_dir = damaged(runs, "paused", tmp_path, file, content)
    before = (run_dir / "metrics.csv").read_bytes()
    with pytest.raises(ValueError, match=message):
        train(tiny_config(run_dir, *WORDS, "resume=auto"))
    assert (run_dir / "metrics.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("gone", "said"), [(["adapter"], "goes on from step-00000004.ckpt"), (["adapter", "checkpoints"], "begins anew")]
)
def test_finished_run_whose_adapter_is_gone_makes_it_again(runs, tmp_path, caplog, gone, said):
    run_dir = damaged(runs, "whole", tmp_path, "result.json", (runs / "whole" / "result.json").read_bytes())
    for name in gone:
        shutil.rmtree(run_dir / name)
    train(tiny_config(run_dir, *WORDS, "resume=auto"))
    assert f"what it trained is gone; it {said}" in caplog.text
    one, other = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (run_dir, runs / "whole"))
    assert all(one[key].equal(other[key]) for key in other)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "sweep.json: damaged"),
        (b'{"words": [', "sweep.json: damaged"),
        (b"[]", "sweep.json: damaged (no object of JSON)"),
        (b"{}", "sweep.json: not a sweep as this version writes it"),
        (b'{"trials": [{"name": "a", "process": null, "colour": 1}], "workers": []}', "use the version that wrote it"),
        (
            b'{"words": [], "swept": ["seed=0,1"], "cluster": "local", "metric": "loss", "workers": [], '
            b'"trials": [{"name": 7, "overrides": ["seed=0"], "process": null}]}',
            "not a sweep as this version writes it (7 of a trial is no text)",
        ),
        (
            b'{"words": null, "swept": [], "cluster": "local", "metric": "loss", "workers": [], "trials": []}',
            "not a sweep as this version writes it",
        ),
    ],
)
def test_damaged_sweep_is_one_line(tmp_path, capsys, content, message):
    (tmp_path / "sweep.json").write_bytes(content)
    for verb in (["status"], ["table"], ["cancel"], ["retry", "failed=true"]):
        assert main(["sweep", verb[0], str(tmp_path), *verb[1:]]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "sweep.json").read_bytes() == content


@pytest.mark.parametrize("text", ["null", "[1]", "{}", '{"status": "finished", "validation_loss": "low"}', '{"status"'])
def test_trial_with_a_damaged_result_has_none(tmp_path, capsys, text):
    trials = [Trial(f"t{n}", [f"seed={n}"], is_waiting=False) for n in range(2)]
    write_sweep(Sweep([], ["seed=0,1"], "local", "validation_loss", count=2, trials=trials), tmp_path)
    for trial, content in zip(trials, (text, '{"status": "finished", "validation_loss": 1.5}'), strict=True):
        (tmp_path / trial.name).mkdir()
        (tmp_path / trial.name / "result.json").write_text(content)
    assert read_result(tmp_path / "t0") is None
    assert main(["sweep", "table", str(tmp_path)]) == 0
    assert "best validation_loss: 1.5 of t1" in capsys.readouterr().out


def test_trial_whose_folder_is_a_file_is_lost_and_hides_no_other(tmp_path, capsys):
    trials = [Trial(f"t{n}", [f"seed={n}"], is_waiting=False) for n in range(2)]
    write_sweep(Sweep([], ["seed=0,1"], "local", "validation_loss", count=2, trials=trials), tmp_path)
    (tmp_path / "t0").write_text("")
    (tmp_path / "t1").mkdir()
    (tmp_path / "t1" / "result.json").write_text('{"status": "finished", "validation_loss": 1.5}')
    assert main(["sweep", "status", str(tmp_path)]) == 0
    assert "2 trials: 1 lost, 1 finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("samples.jsonl", b'{"step": 2, "prompt": "whole"}\n{"step": 2, "pro', "1 of 2 lines of samples.jsonl are"),
        ("samples.jsonl", b'[1]\n3\n\xff\xfe\n{"prompt": "of no step"}\n', "4 of 4 lines of samples.jsonl are"),
        ("config.yaml", b"\xff\xfe", "config.yaml"),
    ],
)
def test_page_is_made_of_what_can_be_read(runs, tmp_path, file, content, said):
    run_dir = damaged(runs, "whole", tmp_path, "metrics.csv", (runs / "whole" / "metrics.csv").read_bytes())
    (run_dir / file).write_bytes(content)
    assert main(["report", str(run_dir)]) == 0
    page = (run_dir / "report.html").read_text()
    assert said in page and ("whole" in page or file != "samples.jsonl" or content.startswith(b"[1]"))


@pytest.mark.parametrize("file", ["result.json", "evaluation.json"])
@pytest.mark.parametrize("content", [b'{"status', b"[1]", b"\xff\xfe"])
def test_card_leaves_out_what_is_damaged_and_what_it_is_of_stands(runs, tmp_path, caplog, file, content):
    run_dir = damaged(runs, "whole", tmp_path, "metrics.csv", (runs / "whole" / "metrics.csv").read_bytes())
    (run_dir / file).write_bytes(content)
    write_card(run_dir / "adapter", run_dir)
    assert f"{file}: damaged" in caplog.text and "the card leaves out what it says" in caplog.text
    assert "| method | lora |" in (run_dir / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("words", [["sweep", "retry", "LOOP", "failed=true"], ["report", "LOOP"], ["inspect", "LOOP"]])
def test_link_that_leads_into_itself_is_one_line(tmp_path, capsys, words):
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    assert main([str(loop) if word == "LOOP" else word for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(loop) in line


def test_copy_of_a_run_is_logged_as_a_run_of_its_own(tmp_path):
    """Two folders with one id wrote into one run of the service, each over the other."""
    original = tmp_path / "one"
    original.mkdir()
    record = service_record(original, "wandb")
    write_record(original, record | {"step": 7}, "wandb")
    shutil.copytree(original, tmp_path / "two")
    copied = service_record(tmp_path / "two", "wandb")
    assert copied["id"] != record["id"] and copied["step"] == 0
    assert service_record(tmp_path / "two", "wandb") == copied
    assert service_record(original, "wandb")["step"] == 7
    moved = original.rename(tmp_path / "three")
    assert service_record(moved, "wandb")["id"] == record["id"]
