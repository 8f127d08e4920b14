"""A mixture of sources by the words of the command line, and the files that a run of one leaves."""

import csv
import json
import math
from pathlib import Path

import pytest

from lightning_peft.__main__ import main
from lightning_peft.compose import compose_config
from lightning_peft.words import everyday

TINY = [
    "model=tiny", "data.max_length=64", "data.micro_batch_size=2", "trainer.max_steps=4", "optimizer.lr=0.01",
    "validation.samples=0",
]  # fmt: skip


@pytest.fixture
def words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = {
        "chat": [{"prompt": f"Hi {n}", "completion": f"Hello {n} there"} for n in range(40)],
        "story": [{"text": f"Story {n} of a dog and a cat"} for n in range(40)],
    }
    for name, some in rows.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return [f"data.sources.{name}.{key}" for name in rows for key in (f"train_path={name}.jsonl", "weight=0.5")]


def test_a_run_of_a_mixture_has_a_validation_loss_of_each_source(words):
    mixed = [*TINY, "validation.every_n_steps=2", "early_stopping.metric=validation_loss/story"]
    assert main(["train", *mixed, *words, "run_dir=mixed", "data.validation_fraction=0.1"]) == 0
    result = json.loads(Path("mixed/result.json").read_text())
    losses = {name: result["metrics"][f"validation_loss/{name}"] for name in ("chat", "story")}
    rows = list(csv.DictReader(Path("mixed/metrics.csv").read_text().splitlines()))
    last = [row for row in rows if row["validation_loss"]][-1]
    for name, loss in losses.items():
        assert float(last[f"validation_loss/{name}"]) == pytest.approx(loss)
    # The oracle is the rows of one source alone, scored by the same adapter.
    evaluated = {}
    for name in losses:
        alone = ["data=jsonl", f"data.train_path={name}.jsonl", "data.validation_fraction=0.1", "models=adapter"]
        assert main(["evaluate", "adapter_path=mixed", *alone, f"output={name}.json"]) == 0
        evaluated[name] = json.loads(Path(f"{name}.json").read_text())["adapter"]["loss"]
    assert losses == {name: pytest.approx(loss, rel=1e-5) for name, loss in evaluated.items()}
    assert min(losses.values()) < result["validation_loss"] < max(losses.values())
    assert main(["evaluate", "adapter_path=mixed", "models=adapter", "output=all.json"]) == 0
    scored = json.loads(Path("all.json").read_text())["adapter"]
    assert scored["loss"] == pytest.approx(result["validation_loss"])
    assert {name: scored["metrics"][f"loss/{name}"] for name in losses} == pytest.approx(losses, rel=1e-5)
    assert main(["evaluate", "adapter_path=mixed", "gate={loss/chat:-9}", "output=gate.json"]) == 0
    assert json.loads(Path("gate.json").read_text())["gate"]["loss/chat"]["passes"]


def test_a_mixture_is_scored_by_its_task_source_by_source(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # The tiny model repeats one answer: it is right for one source, and wrong for the other.
    for name, answer in (("same", "7"), ("other", "8")):
        rows = [{"prompt": f"{name} {n}", "completion": answer if n % 10 == 0 else "7"} for n in range(100)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [f"data.sources.{name}.train_path={name}.jsonl" for name in ("same", "other")]
    mixed = [*TINY, *sources, "data.task=final_number", "data.validation_fraction=0.1", "trainer.max_steps=40"]
    assert main(["train", *mixed, "run_dir=mixed"]) == 0
    words = ["evaluate", "adapter_path=mixed", "samples=0", "output=all.json"]
    assert main([*words, "gate={final_number_accuracy/same:-1,final_number_accuracy/other:-1}"]) == 0
    printed, report = capsys.readouterr().out, json.loads(Path("all.json").read_text())
    assert report["sources"] == {"same": {"rows": 10, "loss_rows": 10}, "other": {"rows": 10, "loss_rows": 10}}
    found = report["adapter"]["metrics"]
    mean = (found["final_number_accuracy/same"] + found["final_number_accuracy/other"]) / 2
    assert found["final_number_accuracy"] == pytest.approx(mean)
    assert report["adapter"]["intervals"].keys() >= {"final_number_accuracy/same"}
    assert report["gate"]["final_number_accuracy/other"]["passes"]
    assert printed.count("of same, 10 rows") == 2 and printed.count("of other, 10 rows") == 2
    # The oracle is one source alone.
    alone = ["data=jsonl", "data.train_path=other.jsonl", "data.task=final_number", "data.validation_fraction=0.1"]
    assert main([*words[:3], "output=other.json", "models=adapter", *alone]) == 0
    scored = json.loads(Path("other.json").read_text())["adapter"]["metrics"]
    assert scored["final_number_accuracy"] == found["final_number_accuracy/other"]


def steps_of(folder):
    rows = csv.DictReader(Path(folder, "metrics.csv").read_text().splitlines())
    return [[row[name] for name in ("step", "loss", "tokens", "grad_norm")] for row in rows if row["loss"]]


@pytest.mark.multi_process
def test_two_ranks_train_and_validate_as_one(words):
    train = ["train", *TINY, *words, "logger=csv", "trainer.accelerator=cpu", "trainer.precision=32-true"]
    assert main([*train, "run_dir=one", "trainer.accumulate_grad_batches=2"]) == 0
    assert main([*train, "run_dir=two", "trainer.devices=2", "strategy=ddp"]) == 0
    one, two = (json.loads(Path(folder, "result.json").read_text()) for folder in ("one", "two"))
    assert two["metrics"] == {name: pytest.approx(loss, rel=1e-6) for name, loss in one["metrics"].items()}
    assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-6)


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_a_resumed_run_is_the_uninterrupted_one(words, streaming):
    train = ["train", *TINY, *words, f"data.streaming={streaming}", "data.shuffle_window=16", "logger=csv"]
    assert main([*train, "run_dir=whole"]) == 0
    assert main([*train, "run_dir=parts", "pause_at=2"]) == 75
    assert main([*train, "run_dir=parts", "resume=auto"]) == 0
    assert steps_of("parts") == steps_of("whole")


def test_other_weights_are_no_resume(words, capsys):
    assert main(["train", *TINY, *words, "run_dir=run", "pause_at=2"]) == 75
    assert main(["train", *TINY, *words, "data.sources.chat.weight=0.9", "run_dir=run", "resume=auto"]) == 2
    assert "data.sources.chat.weight (was 0.5, is 0.9)" in capsys.readouterr().err


def test_a_weight_is_swept_by_name(words):
    sweep = ["data.sources.chat.weight=0.2,0.8", "logger=csv", "run_dir=sweep"]
    assert main(["train", "-m", *TINY, *words[:1], *words[2:], *sweep]) == 0
    results = [json.loads(path.read_text()) for path in sorted(Path("sweep").glob("*/result.json"))]
    assert len(results) == 2 and results[0]["train_loss"] != results[1]["train_loss"]
    assert all(math.isfinite(result["metrics"]["validation_loss/chat"]) for result in results)


SHAPES = {
    "words": ["data.sources.a.train_path=x, y.jsonl", "data.sources.a.weight=1", "data.sources.b.hub_name=org/b",
              "data.sources.b.weight=2"],
    "list": ["data.sources=[{name: a, train_path: 'x, y.jsonl', weight: 1}, {name: b, hub_name: org/b, weight: 2}]"],
    "file": ["my.yaml"],
    "file with a list": ["list.yaml"],
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_sources_may_be_words_a_list_or_a_file(shape, words):
    sources = {"a": {"train_path": "x, y.jsonl", "weight": 1}, "b": {"hub_name": "org/b", "weight": 2}}
    Path("my.yaml").write_text(json.dumps({"data": {"sources": sources}}))
    listed = [{"name": name, **options} for name, options in sources.items()]
    Path("list.yaml").write_text(json.dumps({"data": {"sources": listed}}))
    config = compose_config("train", everyday("train", [*SHAPES[shape], "run_dir=r"]))
    assert config.data.sources == sources and config.data.source == "files"


def test_a_place_in_a_list_is_a_name_too(words):
    listed = ["data.sources=[{train_path: chat.jsonl, weight: 1}, {train_path: story.jsonl, weight: 1}]"]
    config = compose_config("train", everyday("train", [*listed, "data.sources.1.weight=0.25", "run_dir=r"]))
    assert config.data.sources["1"] == {"train_path": "story.jsonl", "weight": 0.25}


WRONG = {
    "no such option": (["data.sources.chat.wieght=1"], "data.sources.chat.wieght: no such option of a source"),
    "no such file": (["data.sources.chat.train_path=none.jsonl"], "data.sources.chat: data.train_path=none.jsonl"),
    "no such column": (["data.sources.chat.prompt_column=ask"], "data.prompt_column=ask: the rows have no such column"),
    "no such metric": (["early_stopping.metric=validation_loss/x", "validation.every_n_steps=1"], "loss/story"),
    "upside down": (["early_stopping.metric=-validation_loss/chat", "validation.every_n_steps=1"], "a small valid"),
    "not a list of options": (["data.sources=[chat.jsonl]"], "data.sources: entry 0 must hold options"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_words_get_one_line(case, words, capsys):
    more, message = WRONG[case]
    assert main(["train", *TINY, *words, *more, "run_dir=r"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line


def test_data_shows_each_source(words, capsys):
    assert main(["data", "model=tiny", "data.max_length=64", *words]) == 0
    shown = capsys.readouterr().out
    assert "chat: 38 samples of 38 rows" in shown and "story: 38 samples of 38 rows" in shown
    assert "76 samples of 76 rows of 2 files" in shown
