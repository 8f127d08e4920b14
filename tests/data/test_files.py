"""Rows from folders, lists, compressed files and URLs."""

import bz2
import datetime
import gzip
import importlib.util
import json
import lzma
from pathlib import Path

import datasets
import fsspec
import openpyxl
import pyarrow
import pytest

from lightning_peft.compose import compose_config
from lightning_peft.data.config import DataConfig
from lightning_peft.data.conversation import BadRow
from lightning_peft.data.files import find_files
from lightning_peft.data.samples import make_samples
from lightning_peft.data.sources import iterate_rows, rows_identity
from lightning_peft.data.turns import read_turns
from lightning_peft.words import everyday

ROWS = [{"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(6)]


def lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def read(path) -> list[dict]:
    rows = list(iterate_rows(DataConfig(train_path=path, validation_fraction=0), "train"))
    assert not [row for row in rows if isinstance(row, BadRow)]
    return [row.values for row in rows]


def zstandard(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESSORS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return three files, two of them in folders; a description and hidden files that are none."""
    for name, rows in {"top.jsonl": ROWS[:1], "a/mid.jsonl.gz": ROWS[1:3], "a/b/low.json": ROWS[3:]}.items():
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(lines(rows)) if name.endswith(".gz") else lines(rows))
    (tmp_path / "set" / "README.md").write_text("About these rows.")
    (tmp_path / "set" / ".cache").mkdir()
    (tmp_path / "set" / ".cache" / "old.jsonl").write_bytes(lines(ROWS))
    return tmp_path / "set"


@pytest.mark.parametrize("packed", COMPRESSORS)
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv"])
def test_compressed_text_is_read_as_its_text(tmp_path, kind, packed):
    separator = "\t" if kind == "tsv" else ","
    table = "".join(separator.join(row.values()) + "\n" for row in [{"a": "prompt", "b": "completion"}, *ROWS])
    content = {"jsonl": lines(ROWS), "json": json.dumps(ROWS).encode()}.get(kind, table.encode())
    (path := tmp_path / f"rows.{kind}{packed}").write_bytes(COMPRESSORS[packed](content))
    assert read(str(path)) == ROWS


@pytest.mark.parametrize("packed", COMPRESSORS)
def test_compressed_file_that_is_cut_is_named(tmp_path, packed):
    whole = COMPRESSORS[packed](lines([{"text": f"{number} {number**9}"} for number in range(5000)]))
    (path := tmp_path / f"rows.jsonl{packed}").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"rows.jsonl{packed}: cannot be read \("):
        read(str(path))


@pytest.mark.parametrize("packed", COMPRESSORS)
def test_file_that_is_not_compressed_as_named_is_named(tmp_path, packed):
    (path := tmp_path / f"rows.jsonl{packed}").write_bytes(lines(ROWS))
    with pytest.raises(ValueError, match=rf"rows.jsonl{packed}: cannot be read \("):
        read(str(path))


def test_folder_gives_the_files_in_it_and_below(folder):
    assert sorted(map(str, read(str(folder)))) == sorted(map(str, ROWS))


def test_two_stars_go_into_folders(folder):
    assert read(f"{folder}/**/*.json*") == [*ROWS[3:], *ROWS[1:3], ROWS[0]]


def test_list_keeps_its_order(folder):
    assert read([f"{folder}/a/b/low.json", f"{folder}/top.jsonl"]) == [*ROWS[3:], ROWS[0]]


def test_list_may_be_given_on_the_command_line(folder):
    word = f"data.train_path=['{folder}/a/b/low.json', {folder}/top.jsonl]"
    config = compose_config("train", ["model=tiny", "data=jsonl", word, "data.validation_fraction=0", "dry_run=true"])
    assert config.data.train_path == [f"{folder}/a/b/low.json", f"{folder}/top.jsonl"]
    assert read(config.data.train_path) == [*ROWS[3:], ROWS[0]]


def test_endings_may_be_in_capitals(tmp_path):
    (tmp_path / "UP.JSONL").write_bytes(lines(ROWS))
    assert read(str(tmp_path / "UP.JSONL")) == ROWS


def test_audit_counts_the_files(folder, chatml):
    _, audit = make_samples(DataConfig(train_path=str(folder), validation_fraction=0), "train", chatml)
    assert audit.lines()[0].startswith("6 samples of 6 rows of 3 files, ")


WRONG = {
    "empty folder": (["x/.keep"], "x", "the folder holds no files of rows"),
    "other files": (["x/a.jsonl", "x/model.bin"], "x", "model.bin must end in .jsonl"),
    "saved data set": (["x/dataset_info.json", "x/a.arrow"], "x", "give data=hub data.hub_name=.*x"),
    "twice": (["x/a.jsonl"], ["x", "x/*.jsonl"], "x/a.jsonl would be read more than once"),
    "one of a list": (["x/a.jsonl"], ["x/a.jsonl", "x/b.jsonl"], "data.train_path=x/b.jsonl: there is no such file"),
    "compressed parquet": (["x/a.parquet.gz"], "x", "a.parquet.gz must end in"),
    "unknown protocol": ([], "nope://a/b.jsonl", "nope://a/b.jsonl: .*nope"),
    "remote file": ([], "memory://absent/b.jsonl", "data.train_path=memory://absent/b.jsonl: there is no such file"),
    "not excel": (["x/a.xlsx"], "x", "x/a.xlsx: (not an Excel file|Excel files need the package openpyxl)"),
    "not arrow": (["x/a.arrow"], "x", "x/a.arrow: not an arrow file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_path_that_cannot_be_read_is_named_in_one_line(tmp_path, monkeypatch, name):
    files, value, message = WRONG[name]
    monkeypatch.chdir(tmp_path)
    for file in files:
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_bytes(lines(ROWS))
    with pytest.raises(ValueError, match=message) as raised:
        read(value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("kind", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_url_without_its_package_names_it(kind, package):
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises(ValueError, match=rf"{kind}:// needs the package {package} \(pip install {package}\)"):
        read(f"{kind}://bucket/rows.jsonl")


@pytest.mark.parametrize("value", [[], [3], 3, {"a": "b"}])
def test_path_of_another_type_is_refused(value):
    with pytest.raises(ValueError, match="must be a file, a folder, a pattern, or a list of them"):
        DataConfig(train_path=value)


def test_urls_are_read_as_files_are(tmp_path):
    system = fsspec.filesystem("memory")
    for name, content in {"a.jsonl": lines(ROWS[:2]), "b/c.jsonl.gz": gzip.compress(lines(ROWS[2:]))}.items():
        system.pipe(f"/{tmp_path.name}/{name}", content)
    base = f"memory://{tmp_path.name}"
    assert read(f"{base}/a.jsonl") == ROWS[:2]
    assert read(base) == ROWS
    assert read(f"{base}/b/*.gz") == ROWS[2:]
    config = DataConfig(train_path=f"{base}/a.jsonl", validation_fraction=0)
    before = rows_identity(config, "train")
    assert rows_identity(config, "train") == before
    system.pipe(f"/{tmp_path.name}/a.jsonl", lines(ROWS[1:3]))
    assert rows_identity(config, "train") != before


def test_arrow_files_are_read(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert read(str(next((tmp_path / "saved").glob("*.arrow")))) == ROWS


DAYS = [["Day?", datetime.date(2024, 1, 2)], ["Moment?", datetime.datetime(2024, 1, 2, 3, 4, 5)]]


def test_excel_cells_are_text(tmp_path):
    book = openpyxl.Workbook()
    for cells in (["prompt", "completion"], ["2 + 2?", 4], ["Half?", 0.5], ["Empty?", None], *DAYS):
        book.active.append(cells)
    book.save(tmp_path / "rows.xlsx")
    assert [tuple(row.values()) for row in read(str(tmp_path / "rows.xlsx"))] == [
        ("2 + 2?", "4"),
        ("Half?", "0.5"),
        ("Empty?", ""),
        ("Day?", "2024-01-02"),
        ("Moment?", "2024-01-02 03:04:05"),
    ]
    book.create_sheet("More").append(["prompt"])
    book.save(tmp_path / "rows.xlsx")
    with pytest.raises(ValueError, match="one sheet with rows is read, this file has 'Sheet', 'More'; save one alone"):
        read(str(tmp_path / "rows.xlsx"))


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        (
            "rows.jsonl",
            '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": "b", "prompt": "z"}\n',
            "line 2",
        ),
        ("rows.jsonl", '{"messages": [{"role": "user", "content": "a", "content": "b"}]}\n', "line 1"),
        ("rows.json", '[{"prompt": "a", "prompt": "z", "completion": "b"}]', "row 1"),
    ],
)
def test_key_that_stands_twice_in_an_object_is_named(tmp_path, name, text, place):
    """json keeps the last of them and drops the others without a word."""
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{place}.*key '(prompt|content)' twice in one object"):
        for row in iterate_rows(DataConfig(train_path=str(tmp_path / name), validation_fraction=0), "train"):
            if isinstance(row, BadRow):
                raise row


@pytest.mark.parametrize(
    "turn",
    [
        {
            "role": "assistant",
            "tool_calls": [{"function": {"name": "f", "arguments": '{"city": "A", "city": "B"}'}}],
        },
        {"role": "function_call", "content": '{"name": "f", "name": "g", "arguments": {}}'},
    ],
)
def test_key_that_stands_twice_in_json_inside_a_row_is_named(turn):
    with pytest.raises(BadRow, match="key '(city|name)' twice in one object"):
        read_turns([{"role": "user", "content": "a"}, turn], "rows.jsonl line 1", "messages")


def workbook(path, *rows):
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.active["F9"].font = openpyxl.styles.Font(bold=True)  # a cell without anything in it
    book.save(path)
    return str(path)


def test_excel_text_is_kept_whatever_it_says(tmp_path):
    answers = ["None", "NA", "null", "n/a", "nan", "#N/A"]
    path = workbook(tmp_path / "r.xlsx", ["q", "a"], *([f"q{n}", text] for n, text in enumerate(answers)))
    found = list(iterate_rows(DataConfig(train_path=path, validation_fraction=0), "train"))
    assert [row.values["a"] for row in found[:-1]] == answers[:-1]
    assert "row 7, column 'a': expected a value, got 'an error of the formula'" in str(found[-1])


def test_excel_rows_and_columns_without_a_cell_are_none(tmp_path):
    path = workbook(tmp_path / "r.xlsx", ["q", "a"], ["one", 5], [None, None], ["two", ""])
    assert read(path) == [{"q": "one", "a": "5"}, {"q": "two", "a": ""}]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "r.csv",
            "question;answer\nWhat is 2, and 3?;5\n",
            "commas, and these .question, answer. by semicolons; save it",
        ),
        ("r.csv", "\ufeffquestion\tanswer\nWhat?\t5\n", "commas, and these .question, answer. by tabs; name it .tsv"),
        ("r.csv", "question|answer\nWhat?|5\n", "by bars; save it with commas"),
        ("r.tsv", "question,answer\nWhat?,5\n", "tabs, and these .question, answer. by commas; name it .csv"),
        ("r.csv", "sep=;\nprompt;completion\n", "'sep=;' tells Excel of a separator and names no columns; delete"),
    ],
)
def test_table_with_another_separator_is_told_so(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} line 1: .*{message}"):
        read(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("r.txt", "a document in a .jsonl"), ("r.TXT", "a line"), ("r.xls", "save it as .xlsx"), ("r.zip", "unpack"),
     ("r.tar.gz", "unpack it"), ("r.pkl", "a pickle runs code"), ("r.yaml", "lightning-peft train my.yaml")],
)  # fmt: skip
def test_file_that_holds_no_rows_has_a_remedy(tmp_path, monkeypatch, name, remedy):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text("x")
    words = everyday("train", [f"data={name}"])
    assert words == ["data=jsonl", f"data.train_path={name}"]
    with pytest.raises(ValueError, match=rf"^data.train_path={name}: .* must end in .*{remedy}"):
        find_files("data.train_path", name)


@pytest.mark.parametrize("name", ["r.JSONL", "r.Jsonl", "r.CSV", "r.JSONL.GZ", "r.Parquet", "not_there.JSON"])
def test_data_is_a_file_whatever_the_case_of_its_ending(name):
    assert everyday("train", [f"data={name}"]) == ["data=jsonl", f"data.train_path={name}"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl", lines(ROWS).decode().encode("utf-16"), "is text in UTF-16; save it as UTF-8"),
        ("r.jsonl", lines(ROWS).decode().encode("utf-32"), "is text in UTF-32; save it as UTF-8"),
        ("r.csv", "prompt,completion\na,b\n".encode("utf-16"), "is text in UTF-16; save it as UTF-8"),
        ("r.jsonl", gzip.compress(lines(ROWS)), "is compressed; let its name end in .gz"),
        ("r.json", zstandard(lines(ROWS)), "is compressed; let its name end in .zst"),
        ("r.csv", b"PK\x03\x04 and so on", "is an archive or an Excel file; let its name end in .xlsx, or unpack it"),
        ("r.jsonl", b"PAR1 and so on", "is Parquet; let its name end in .parquet"),
        ("r.json", json.dumps({"version": 1, "data": ROWS}).encode(), "is one object whose rows are inside 'data'; "),
        ("r.json", json.dumps({"rows": ROWS}, indent=2).encode(), "is one object whose rows are inside 'rows'; "),
        ("r.json", json.dumps(ROWS[0], indent=2).encode(), "is one object over several lines; rows are an array of"),
    ],
    ids=[
        "utf-16",
        "utf-32",
        "utf-16 csv",
        "gzip",
        "zstandard",
        "archive",
        "parquet",
        "in data",
        "in rows",
        "one object",
    ],
)
def test_file_that_is_not_what_its_name_says_is_told_so(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^{tmp_path / name}: {message}"):
        read(str(tmp_path / name))


@pytest.mark.parametrize("row", [{"data": "x", "text": "y"}, {"items": [], "text": "y"}, {"data": ["a"], "text": "y"}])
def test_one_row_of_json_is_a_row(tmp_path, row):
    (tmp_path / "r.json").write_text(json.dumps(row))
    assert read(str(tmp_path / "r.json")) == [row]


def test_columns_that_need_quotes_are_shown_with_them(tmp_path, chatml):
    (tmp_path / "r.csv").write_text("prompt, completion\na,b\n")
    config = DataConfig(train_path=str(tmp_path / "r.csv"), validation_fraction=0)
    with pytest.raises(ValueError, match="the columns are prompt, ' completion'; name two with"):
        make_samples(config, "train", chatml)


@pytest.mark.parametrize(
    ("columns", "likely"),
    [
        ("question,answer", "question data.completion_column=answer"),
        ("Prompt,Response", "Prompt data.completion_column=Res"),
    ],
)
def test_columns_as_people_call_them_are_proposed(tmp_path, chatml, columns, likely):
    (tmp_path / "r.csv").write_text(f"{columns}\na,b\n")
    with pytest.raises(ValueError, match=f"or data.messages_column, as data.prompt_column={likely}"):
        make_samples(DataConfig(train_path=str(tmp_path / "r.csv"), validation_fraction=0), "train", chatml)


def test_data_may_be_a_list_of_files(folder):
    words = everyday("train", [f"data=[{folder}/top.jsonl, '{folder}/a/b/low.json']"])
    config = compose_config("train", words)
    assert config.data.train_path == [f"{folder}/top.jsonl", f"{folder}/a/b/low.json"]
    with pytest.raises(ValueError, match="takes one option; add -m and write data=alpaca,gsm8k for a sweep"):
        everyday("train", ["data=[alpaca,gsm8k]"])
