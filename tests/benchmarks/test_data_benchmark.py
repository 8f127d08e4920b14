"""The figures of docs/your-data.md on host memory and speed, in small."""

import json
from pathlib import Path

import pytest

from benchmarks import data


def test_rows_have_the_length_that_the_figures_name(tmp_path, capsys):
    data.write_rows(tmp_path / "rows.jsonl", 40)
    data.hold(str(tmp_path / "rows.jsonl"), "none")
    held = json.loads(capsys.readouterr().out)
    assert held["tokens"] / 38 == pytest.approx(data.TOKENS, rel=0.05)  # 5 % of 40 rows are held out
    assert held["mib"] > 0


def test_memory_is_a_slope_over_two_sizes_with_and_without_the_cache(monkeypatch, capsys):
    """Of made up memories, so that the slope is known: 100 MiB and 2 KiB a row, where rows are not mapped."""
    calls = []

    def run(words, **options):
        calls.append(words)
        rows = len(Path(words[-2]).read_text().splitlines())
        held = json.dumps({"tokens": 200 * rows, "mib": 100 + (rows / 512 if words[-1] == "none" else 0)})
        return type("Done", (), {"stdout": held})

    monkeypatch.setattr(data.subprocess, "run", run)
    data.memory(1000)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1] for line in lines if line.startswith("cache")] == [
        "1.91 GiB for each million rows", "0.00 GiB for each million rows",
    ]  # fmt: skip
    assert [words[-1] == "none" for words in calls] == [True, True, False, False, False, False]


def test_speed_is_of_the_second_reading(capsys):
    data.speed(30)
    assert float(capsys.readouterr().out.split(" rows a second")[0]) > 1
