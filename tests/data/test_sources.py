import json
from pathlib import Path

import datasets
import huggingface_hub.constants
import pytest

from lightning_peft.data.config import DataConfig, OnBadRow
from lightning_peft.data.conversation import BadRow
from lightning_peft.data.samples import read_conversations
from lightning_peft.data.sources import iterate_rows

ROWS = [{"prompt": f"question {number}", "completion": f"answer {number}", "level": number} for number in range(300)]


def read(config: DataConfig, split: str) -> list[dict]:
    """Read all rows of a split; raises the first that cannot be read."""
    values = []
    for row in iterate_rows(config, split):
        if isinstance(row, BadRow):
            raise row
        values.append(row.values)
    return values


def write(path: Path, suffix: str) -> None:
    rows = datasets.Dataset.from_list(ROWS[:5])
    if suffix == "parquet":
        rows.to_parquet(path)
    elif suffix == "csv":
        path.write_text('prompt,completion,level\n"a, ""b""\nc",x,1\nd,y,2\n')
    elif suffix == "json":
        path.write_text(json.dumps(ROWS[:5]))
    else:
        path.write_text("\n".join(map(json.dumps, ROWS[:5])) + "\n\n")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_file_gives_its_rows_with_all_columns(tmp_path, suffix):
    write(path := tmp_path / f"rows.{suffix}", suffix)
    assert read(DataConfig(train_path=str(path), validation_fraction=0), "train") == ROWS[:5]


def test_csv_gives_text_and_the_line_of_a_row(tmp_path):
    write(path := tmp_path / "rows.csv", "csv")
    rows = list(iterate_rows(DataConfig(train_path=str(path), validation_fraction=0), "train"))
    assert [row.values for row in rows] == [
        {"prompt": 'a, "b"\nc', "completion": "x", "level": "1"},
        {"prompt": "d", "completion": "y", "level": "2"},
    ]
    assert [row.origin for row in rows] == [f"{path} line 3", f"{path} line 4"]


def test_json_lines_named_json_are_read(tmp_path):
    write(path := tmp_path / "rows.json", "jsonl")
    assert read(DataConfig(train_path=str(path), validation_fraction=0), "train") == ROWS[:5]


def test_home_and_pattern_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}))
    rows = read(DataConfig(train_path="~/*.jsonl", validation_fraction=0), "train")
    assert rows == [{"text": "a"}, {"text": "b"}]


MALFORMED = {
    "cut line": ("a.jsonl", '{"text": "a"}\n{"text": "b\n', r"a.jsonl line 2: expected a JSON object \(Unterminated"),
    "blank lines count": ("a.jsonl", '\n\n{"text"}\n', "a.jsonl line 3: expected a JSON object"),
    "not an object": ("a.jsonl", "[1, 2]\n", r"a.jsonl line 1: expected a JSON object, got \[1, 2\] \(list\)"),
    "not UTF-8": ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl line 1: expected UTF-8 text"),
    "array of numbers": ("a.json", '[{"text": "a"}, 3]', r"a.json row 2: expected a JSON object, got 3 \(int\)"),
    "too many fields": ("a.csv", "a,b\n1,2\n1,2,3\n", r"a.csv line 3: expected 2 fields, got 3 \(int\)"),
    "too few fields": ("a.csv", "a,b\n1\n", r"a.csv line 2: expected 2 fields, got 1 \(int\)"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_row_is_named(tmp_path, name):
    file, content, message = MALFORMED[name]
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    config = DataConfig(train_path=str(tmp_path / file), validation_fraction=0)
    with pytest.raises(BadRow, match=message):
        read(config, "train")


def test_malformed_rows_are_skipped_on_request(write_jsonl):
    path = write_jsonl([ROWS[0], "{oops", ROWS[1], "[]"])
    config = DataConfig(train_path=path, validation_fraction=0, on_bad_row=OnBadRow.skip)
    assert [values for values, _ in read_conversations(config, "train", tokenizer=None)] == ROWS[:2]


UNREADABLE = {
    "missing": (None, "a.jsonl", r"data.train_path=.*a.jsonl: there is no such file \(working folder "),
    "pattern": (None, "*.csv", "data.train_path=.*: there is no such file"),
    "empty": ("", "a.jsonl", "data.train_path=.*a.jsonl is empty"),
    "ending": (
        "x",
        "a.txt",
        "a.txt must end in .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow, .xlsx, ",
    ),
    "array cut": ("[{}, \n", "a.json", r"a.json line 2: not JSON"),
    "quote open": ('a\n"b\n', "a.csv", "a.csv after line 1: not CSV in UTF-8"),
    "not parquet": ("x" * 100, "a.parquet", "a.parquet: not a parquet file"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_file_is_named(tmp_path, name):
    content, file, message = UNREADABLE[name]
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        read(DataConfig(train_path=str(tmp_path / file)), "train")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "data.train_path=null: give a JSONL"),
        ({"source": "s3"}, "data.source=s3: must be one of files, hub, text_to_sql, cmudict"),
        ({"source": "hub"}, "data.hub_name=null: give the name of a data set on the hub"),
    ],
)
def test_missing_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        read(DataConfig(**options), "train")


def test_held_out_rows_are_a_share_and_never_trained(write_jsonl):
    path = write_jsonl(ROWS)
    for seed in range(3):
        options = {"train_path": path, "validation_fraction": 0.1, "split_seed": seed}
        train = read(DataConfig(**options), "train")
        validation = read(DataConfig(**options), "validation")
        assert len(validation) == 30
        assert sorted(row["level"] for row in train + validation) == list(range(300))
        assert read(DataConfig(**options), "test") == validation


def test_limits_move_no_row_from_training_to_validation(write_jsonl):
    path = write_jsonl(ROWS)
    everything = read(DataConfig(train_path=path), "train")
    limited = DataConfig(train_path=path, max_rows=50, max_validation_rows=3)
    assert read(limited, "train") == everything[:50]
    assert len(read(limited, "validation")) == 3
    assert not [row for row in read(limited, "validation") if row in everything]


def test_own_validation_file_leaves_all_rows_to_training(write_jsonl):
    config = DataConfig(train_path=write_jsonl(ROWS[:40]), validation_path=write_jsonl(ROWS[40:50], "v.jsonl"))
    assert read(config, "train") == ROWS[:40]
    assert read(config, "validation") == ROWS[40:50]


def test_fraction_zero_turns_validation_off(write_jsonl):
    config = DataConfig(train_path=write_jsonl(ROWS[:40]), validation_fraction=0)
    assert read(config, "train") == ROWS[:40]
    assert read(config, "validation") == []


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_reads_splits_of_a_local_folder(tmp_path, streaming, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    datasets.Dataset.from_list(ROWS[:7]).to_json(folder / "train.jsonl")
    datasets.Dataset.from_list(ROWS[7:9]).to_json(folder / "test.jsonl")
    config = DataConfig(source="hub", hub_name=str(folder), hub_validation_split="test", streaming=streaming)
    assert read(config, "train") == ROWS[:7]
    assert read(config, "validation") == ROWS[7:9]
    config.hub_split = "nope"
    with pytest.raises(ValueError, match=r"data.hub_config=None split nope: .*[Ss]plit"):
        read(config, "train")


def test_hub_out_of_reach_says_what_to_give_instead(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    config = DataConfig(source="hub", hub_name="nobody/nothing")
    with pytest.raises(ValueError, match="^data.hub_name=nobody/nothing: not found .* give data=jsonl data.train_path"):
        read(config, "train")


def test_gsm8k_rows_are_found():
    folder = Path("../shared/data/gsm8k")
    if not folder.exists():
        pytest.skip(f"{folder} is not here")
    config = DataConfig(train_path=str(folder / "train.jsonl"), validation_path=str(folder / "test.jsonl"))
    assert len(read(config, "train")) == 7473
    assert len(read(config, "validation")) == 200
