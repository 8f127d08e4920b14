"""One record that cannot be read is one bad row: in a JSON array, and in a table."""

import csv
import io
import json
import random

import pytest

from lightning_peft.data.config import DataConfig, OnBadRow
from lightning_peft.data.conversation import BadRow
from lightning_peft.data.records import elements, records
from lightning_peft.data.samples import make_samples
from lightning_peft.data.sources import iterate_rows
from lightning_peft.models.tiny import tiny_tokenizer

GOOD = '{"prompt": "a, [b] \\"c\\" {d", "completion": "e"}'
DEEP = 990
BAD = {
    "key twice": '{"prompt": "a", "completion": "b", "prompt": "c"}',
    "long number": f'{{"prompt": "a", "completion": "b", "n": {"9" * 5000}}}',
    "deep": f'{{"prompt": "a", "completion": "b", "n": {"[" * DEEP}{"]" * DEEP}}}',
    "deeper": f'{{"prompt": "a", "completion": "b", "n": {"[" * 100_000}{"]" * 100_000}}}',
    "no value": '{"prompt": "a", "completion": tru}',
    "no comma": '{"prompt": "say "hi" now", "completion": "b"}',
    "no object": "nothing",
    "nothing": "",
    "half of a pair": '{"prompt": "cut \\ud83d", "completion": "b"}',
}


def read(path):
    return list(iterate_rows(DataConfig(train_path=str(path), validation_fraction=0), "train"))


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_bad_element_of_an_array_is_one_bad_row(tmp_path, bad, place):
    path = tmp_path / "rows.json"
    rows = [GOOD, GOOD]
    rows.insert(place, bad)
    path.write_text(f"[{', '.join(rows)}]")
    config = DataConfig(train_path=str(path), validation_fraction=0, on_bad_row=OnBadRow.skip)
    samples, audit = make_samples(config, "train", tiny_tokenizer())
    assert (len(samples), audit.rows, audit.bad_rows) == (2, 3, 1)
    assert audit.bad_row_messages[0].startswith(f"{path} row {place + 1}")
    good = [row.values for row in read(path) if not isinstance(row, BadRow) and "n" not in row.values]
    assert good == [json.loads(GOOD)] * 2


@pytest.mark.parametrize("text", [f"[{GOOD}, {{]", f"[{GOOD}", f'[{GOOD}, {{"a": "b}}]', f"[{GOOD}] 1", f"[{GOOD}]]"])
def test_array_whose_end_cannot_be_told_is_refused(tmp_path, text):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(ValueError, match="rows.json line 1: not JSON"):
        read(tmp_path / "rows.json")


def test_elements_are_those_that_json_reads():
    rng = random.Random(0)

    def value(depth):
        kind = rng.randrange(6 if depth else 3)
        if kind < 3:
            return rng.choice(["a,]}{[", '"', "\\", '\\"', "é\n", 1.5, None, True, ""])
        if kind == 3:
            return [value(depth - 1) for _ in range(rng.randrange(3))]
        return {rng.choice("ab,]}"): value(depth - 1) for _ in range(rng.randrange(3))}

    for _ in range(300):
        rows = [value(3) for _ in range(rng.randrange(4))]
        text = json.dumps(rows, indent=rng.choice([None, 1]), ensure_ascii=rng.random() < 0.5)
        assert [json.loads(element) for element in elements(text)] == rows


TABLES = {
    "text behind quotes": ('"c"d,e\n', "line 3: expected CSV ("),
    "over two lines": ('"c\nd"e,f\n', "lines 3 to 4: expected CSV ("),
    "quotes that go on": ('"c"d,"e\nf,g",h\n', "lines 3 to 4: expected CSV ("),
    "three fields": ("c,d,e\n", "line 3: expected 2 fields, got 3"),
    "one field": ("c\n", "line 3: expected 2 fields, got 1"),
}


@pytest.mark.parametrize(("broken", "message"), TABLES.values(), ids=TABLES)
def test_bad_row_of_a_table_is_one_bad_row(tmp_path, broken, message):
    path = tmp_path / "rows.csv"
    path.write_text(f"prompt,completion\na,b\n{broken}\nf,g\n")
    first, bad, last = read(path)
    assert (first.values, last.values) == ({"prompt": "a", "completion": "b"}, {"prompt": "f", "completion": "g"})
    assert str(bad).startswith(f"{path} {message}")
    assert last.origin == f"{path} line {4 + broken.count(chr(10))}"


def test_records_are_those_that_csv_reads():
    rng = random.Random(0)
    for _ in range(300):
        rows = [
            ["".join(rng.choices('a,"\n\r é', k=rng.randrange(5))) for _ in "ab"] for _ in range(rng.randrange(1, 4))
        ]
        text = io.StringIO(newline="")
        csv.writer(text).writerows(rows)
        lines = io.StringIO(text.getvalue(), newline="")
        assert [record.fields for record in records(lines, ",", "rows.csv")] == rows
