"""The figures of docs/your-data.md on host memory and speed, in small."""

import json

import pytest

from benchmarks import data


def test_rows_have_the_length_that_the_figures_name(tmp_path, capsys):
    data.write_rows(tmp_path / "rows.jsonl", 40)
    data.hold(str(tmp_path / "rows.jsonl"), "none")
    held = json.loads(capsys.readouterr().out)
    assert held["tokens"] / 38 == pytest.approx(data.TOKENS, rel=0.05)  # 5 % of 40 rows are held out
    assert held["mib"] >= 0  # the process has read rows before


@pytest.mark.slow
def test_memory_is_a_slope_over_two_sizes_with_and_without_the_cache(capsys):
    data.memory(100)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" rows")[0] for line in lines if " rows, " in line] == ["20", "100"] * 2
    assert sum("GiB for each million rows" in line for line in lines) == 2


def test_speed_is_of_the_second_reading(capsys):
    data.speed(30)
    assert float(capsys.readouterr().out.split(" rows a second")[0]) > 1
