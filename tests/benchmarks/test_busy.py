"""Steps beside busy processes: how many run beside each, and which figure is above its bar."""

import json
import os
import time
from pathlib import Path

import pytest

from benchmarks.busy import Company, above_bars, main


def states(company: Company) -> list[str]:
    return [
        Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] for process in company.processes
    ]


def test_as_many_run_as_a_step_is_to_have_beside_it(tmp_path):
    company = Company(str(tmp_path / "seconds.json"), (0, 1, 2))
    company.on_train_start(None, None)
    try:
        for count in (0, 1, 2):
            company.have(count)
            deadline = time.monotonic() + 20
            while states(company).count("T") != 2 - count:
                assert time.monotonic() < deadline, states(company)
                time.sleep(0.05)
        pids = [process.pid for process in company.processes]
    finally:
        company.on_exception(None, None, RuntimeError("left"))
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_what_is_above_its_bar_is_said():
    rows = {"beside": {"1_to_quiet": 2.1, "2_to_quiet": 3.4}, "quiet": {"to_spinning": 1.01}}
    assert above_bars(rows) == ["beside: 2_to_quiet is 3.40, and may be 3.3"]
    rows["quiet"]["to_spinning"] = 1.03
    assert len(above_bars(rows)) == 2


@pytest.mark.slow
def test_both_parts_are_measured(tmp_path, monkeypatch, capsys):
    """The command is started, not forked: the origin of a fork has threads where nobody says how many."""
    for name in ("GOMP_SPINCOUNT", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    output = tmp_path / "busy.json"
    status = main(["--shape", "tiny", "--tokens", "64", "--steps", "2", "--turns", "1", "--output", str(output)])
    assert "GOMP_SPINCOUNT" not in os.environ
    rows = json.loads(output.read_text())["rows"]
    assert {count: len(found) for count, found in rows["beside"]["seconds"].items()} == {"0": 2, "1": 2, "2": 2}
    assert {name: len(found) for name, found in rows["quiet"]["seconds"].items()} == {"as_it_is": 4, "spinning": 4}
    printed = capsys.readouterr().out
    assert "1_to_quiet" in printed and "to_spinning" in printed
    assert status == bool(above_bars(rows)) and ("within the bars" in printed) == (status == 0)
