"""The package from Python: rows in, a run out."""

import datetime
import json
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pandas
import pyarrow
import pytest
import torch

import lightning_peft
from lightning_peft import finetune, load
from lightning_peft.rows_in_memory import lines_of

ROWS = [{"prompt": f"What is {n} plus {n}?", "completion": str(2 * n)} for n in range(24)]
WORDS = ["model=tiny", "trainer.max_steps=2", "trainer.precision=32-true", "data.validation_fraction=0.2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finetune(ROWS, *WORDS, "method=lora", "rank=4", f"run_dir={tmp_path_factory.mktemp('api') / 'run'}")


def test_run_has_adapter_metrics_and_history(run):
    assert (run.adapter / "adapter_model.safetensors").is_file()
    assert run.metrics["status"] == "finished" and run.metrics["validation_loss"] > 0
    assert [row["step"] for row in run.history][:2] == ["1", "2"]


def test_run_answers_one_prompt_and_several_alike(run):
    alone = run.generate("What is 3 plus 3?", max_new_tokens=4)
    assert isinstance(alone, str)
    assert run.generate(["What is 3 plus 3?", "And 4?"], max_new_tokens=4)[0] == alone
    assert torch.is_grad_enabled()


def test_run_is_merged_and_loaded_again(run, tmp_path):
    receipt = run.merge(tmp_path / "merged")
    assert receipt.top1_agreement > 0.9 and (tmp_path / "merged" / "model.safetensors").is_file()
    assert load(run.folder).generate("Hi", max_new_tokens=2) == run.generate("Hi", max_new_tokens=2)


def test_bare_adapter_folder_is_loaded_too(run):
    assert load(run.adapter).generate("Hi", max_new_tokens=2) == run.generate("Hi", max_new_tokens=2)
    with pytest.raises(ValueError, match="no result.json, so it is an adapter folder"):
        _ = load(run.adapter).metrics


def test_rows_of_a_data_set_and_of_a_file_train_the_same(run, tmp_path):
    words = [*WORDS, "method=lora", "rank=4"]
    of_set = finetune(datasets.Dataset.from_list(ROWS), *words, f"run_dir={tmp_path}/set")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    of_file = finetune(tmp_path / "rows.jsonl", *words, f"run_dir={tmp_path}/file")
    losses = {each.metrics["train_loss"] for each in (run, of_set, of_file)}
    assert len(losses) == 1


def test_rows_of_memory_are_kept_so_that_the_run_goes_on(run):
    again = finetune(ROWS, *WORDS, "rank=4", "resume=auto", f"run_dir={run.folder}")
    assert again.metrics == run.metrics


def test_rows_of_another_run_are_not_overwritten(run):
    before = (run.folder / "rows" / "train.jsonl").read_bytes()
    with pytest.raises(ValueError, match="the run in this folder has other rows; give those, or name a new run_dir"):
        finetune(ROWS[:5], *WORDS, f"run_dir={run.folder}")
    assert (run.folder / "rows" / "train.jsonl").read_bytes() == before


def test_corrected_rows_are_taken_where_no_run_has_begun(tmp_path):
    words = [*WORDS, "data.on_bad_row=error", f"run_dir={tmp_path}/run"]
    with pytest.raises(ValueError, match="train.jsonl"):
        finetune([*ROWS, {"prompt": "no answer"}], *words)
    assert finetune(ROWS, *words).metrics["status"] == "finished"


@pytest.mark.parametrize(
    "table",
    [
        pandas.DataFrame(ROWS),
        pyarrow.Table.from_pylist(ROWS),
        datasets.Dataset.from_list(ROWS),
        tuple(ROWS),
        (row for row in ROWS),
    ],
)
def test_rows_of_any_table_are_the_same_lines(table):
    assert [json.loads(line) for line in lines_of(table, "rows")] == ROWS


def test_values_of_tables_are_the_nearest_that_json_has():
    moment = datetime.datetime(2024, 5, 6, 7, 8)
    table = pandas.DataFrame({"n": np.int64([3, 4]), "x": [0.5, np.nan], "at": [moment, pandas.NaT]})
    rows = [json.loads(line) for line in lines_of(table, "rows")]
    assert rows == [{"n": 3, "x": 0.5, "at": "2024-05-06T07:08:00"}, {"n": 4, "x": None, "at": None}]
    row = {"n": np.int64(3), "ids": np.arange(3), "deep": [{"x": np.float32(0.5)}], "text": "é"}
    assert lines_of([row], "rows") == ['{"n": 3, "ids": [0, 1, 2], "deep": [{"x": 0.5}], "text": "é"}']


def test_a_conversation_is_gone_on_with(run):
    turns = [{"role": "user", "content": "Hi"}]
    answer = run.generate("Hi", max_new_tokens=4)
    assert run.generate(turns, max_new_tokens=4) == run.generate({"messages": turns}, max_new_tokens=4) == answer
    longer = [*turns, {"role": "assistant", "content": answer}, {"role": "user", "content": "And then?"}]
    both = run.generate([turns, longer, "Hi"], max_new_tokens=4)
    assert both == [answer, run.generate(longer, max_new_tokens=4), answer]
    assert run.generate([]) == []


def test_columns_that_are_not_part_of_a_prompt_are_said(run, caplog):
    row = {"prompt": "Hi", "level": "easy"}
    assert run.generate([row, "Ho"], max_new_tokens=4)[0] == run.generate("Hi", max_new_tokens=4)
    (said,) = [record.message for record in caplog.records if record.name == "lightning_peft.api"]
    assert said.startswith("prompt: not part of the prompts: ") and "level" in said and said.endswith("(1 rows)")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([["Hi"]], r"prompt\[0\]=\['Hi'\]: is a list; give a text, a list of turns with role and content"),
        (["Hi", 5], r"prompt\[1\]=5: is a int; give a text"),
        ([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}], "end in an answer"),
        ({"question": "Hi"}, r"prompt\[0\]: expected text under prompt, or turns under messages"),
    ],
)
def test_a_prompt_of_another_kind_is_named(run, prompt, message):
    with pytest.raises(ValueError, match=message):
        run.generate(prompt)


def test_options_of_python_say_what_words_say(run, tmp_path):
    options = {
        "trainer": {"max_steps": 2, "precision": "32-true"}, "data": {"validation_fraction": np.array(0.2)},
        "method": "lora", "adapter": {"rank": 8, "target_modules": np.array(["q_proj"])}, "model": "org/name",
        "run_dir": tmp_path / "run's",
    }  # fmt: skip
    again = finetune(ROWS, "model=tiny", "rank=r4", "target_modules=all_linear", **options)
    assert again.folder == tmp_path / "run's"
    assert again.metrics["train_loss"] == run.metrics["train_loss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 1e-4}, "lr: no such option; use optimizer.lr"),
        ({"data": {"max_lenght": 8}}, "data.max_lenght: no such option; .*data.max_length"),
        ({"adapter": {"rank": "four"}}, "adapter.rank.*must be a whole number"),
        ({"adapter.rank": 4, "adapter": {"rank": 4}}, "options: has adapter.rank twice"),
        ({"data": "alpaca"}, "^data=alpaca: names rows, and rows are given already"),
        ({"data": {"train_path": "other.jsonl"}}, "^data.train_path=other.jsonl: names rows"),
        ({"data": {"sources": ({"train_path": "other.jsonl"},)}}, "^data.sources.0.train_path=other.jsonl: names rows"),
        (
            {"validation_rows": ROWS, "data": {"validation_path": "v.jsonl"}},
            "^validation_rows and .*: give one of them",
        ),
    ],
)
def test_wrong_options_of_python_are_answered_as_words_are(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        finetune(ROWS, *WORDS, f"run_dir={tmp_path}/run", **options)


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        ([], [], "rows: none are given"),
        (ROWS, ["lr=1"], "lr: no such option; use optimizer.lr"),
        ([{"x": 1}], [], "train.jsonl"),
        ([("a", "b")], [], r"rows\[0\]=\('a', 'b'\): is a tuple; a row is a dictionary"),
        (datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)), [], "rows: is one DatasetDict of 'train'; give"),
        ([{"prompt": "a", "completion": b"b"}], [], r"rows\[0\]\['completion'\]=b'b': bytes is nothing that JSON has"),
        (ROWS, [["rank=4"]], r"words: \['rank=4'\] is a list; put a star before it"),
        (5, [], "rows=5: is no list"),
    ],
)
def test_wrong_input_is_a_value_error(rows, words, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        finetune(rows, *WORDS, *words, f"run_dir={tmp_path}/run")


def test_names_are_imported_when_they_are_asked_for():
    code = (
        "import sys, lightning_peft; assert 'torch' not in sys.modules; "
        "lightning_peft.finetune; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(lightning_peft.__file__).parents[1])
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        lightning_peft.nope  # noqa: B018
