"""A row that `datasets` cannot take is one bad row of the data set, by file and line, streamed or not."""

import json

import pytest

from lightning_peft.data.config import DataConfig
from lightning_peft.data.conversation import BadRow
from lightning_peft.data.sources import iterate_rows, rows_identity

GOOD = json.dumps({"prompt": "Hi", "completion": "b"}).encode() + b"\n"
FOLDERS = {
    "broken JSON": ({"train.jsonl": GOOD * 3 + b"{broken\n" + GOOD}, 5, "train.jsonl line 4: expected a JSON object"),
    "broken JSON in the second file": (
        {"train-0.jsonl": GOOD * 2, "train-1.jsonl": GOOD + b"{\n" + GOOD}, 5, "train-1.jsonl line 2: expected a JSON",
    ),
    "bytes of another encoding": (
        {"train.csv": b"prompt,completion\nHi,b\n\xe9,b\nHi,c\n"}, 3, "train.csv line 3: expected UTF-8 text",
    ),
    "text behind a quoted field": (
        {"train.csv": b'prompt,completion\nHi,b\n"c"d,e\nHi,c\n'}, 3, "",
    ),
    "other columns": ({"train-0.jsonl": GOOD, "train-1.jsonl": b'{"other": "x"}\n' + GOOD}, 3, ""),
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def config_of(folder, files, **options):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return DataConfig(source="hub", hub_name=str(folder), validation_fraction=0, **options)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("files", "count", "message"), FOLDERS.values(), ids=FOLDERS)
def test_bad_row_is_one_of_all_rows(tmp_path, streaming, files, count, message):
    config = config_of(tmp_path / "rows", files, streaming=streaming)
    rows = list(iterate_rows(config, "train"))
    bad = [str(row) for row in rows if isinstance(row, BadRow)]
    assert len(rows) == count and len(bad) <= 1
    if message:
        (line,) = bad
        assert line.startswith(f"{tmp_path}/rows/{message}")
    good = [row.values for row in rows if not isinstance(row, BadRow)]
    assert good[0] == {"prompt": "Hi", "completion": "b"} and good[-1].keys() == {"prompt", "completion"}


def test_reading_row_by_row_is_said_with_its_reason(tmp_path, caplog):
    config = config_of(tmp_path / "rows", FOLDERS["other columns"][0])
    list(iterate_rows(config, "train"))
    assert f"{tmp_path}/rows train: Couldn't cast " in caplog.text and "files are read row by row" in caplog.text


def test_other_bytes_are_another_data_set_although_datasets_cannot_read_it(tmp_path):
    config = config_of(tmp_path / "rows", FOLDERS["broken JSON"][0])
    before = rows_identity(config, "train")
    assert rows_identity(config, "train") == before
    (tmp_path / "rows" / "train.jsonl").write_bytes(GOOD + b"{broken\n")
    assert rows_identity(config, "train") != before


@pytest.mark.parametrize("streaming", [False, True])
def test_broken_file_that_is_not_of_rows_is_one_line(tmp_path, streaming):
    config = config_of(tmp_path / "rows", {"train.parquet": b"hello"}, streaming=streaming)
    with pytest.raises(ValueError, match="^data.hub_name=.*rows data.hub_config=None split train: .*Parquet"):
        list(iterate_rows(config, "train"))
