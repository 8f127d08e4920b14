"""The benchmark of trials that train together, on tiny models: it runs, and the ways compute the same."""

import json

import pytest

from benchmarks import together


def test_step_together_is_measured_and_its_losses_are_those_alone(tmp_path):
    words = ["--parts=steps", "--model=tiny", "--tokens", "16", "--repeats=1", "--dtype=float32"]
    together.main([*words, f"--folder={tmp_path}"])
    rows = json.loads((tmp_path / "together.json").read_text())["rows"]
    assert rows["16 tokens a trial"]["first_losses_differ_by"] < 1e-6


@pytest.mark.slow
def test_memory_of_real_processes_is_measured_beside_the_planned(tmp_path, monkeypatch):
    monkeypatch.setattr(together, "MEMORY", {"tiny": ["data.max_length=64"]})
    together.main(["--parts=memory", "--shape=tiny", "--trials=2", f"--folder={tmp_path}"])
    row = json.loads((tmp_path / "together_memory.json").read_text())["rows"]["tiny"]
    assert row["first_losses_differ_by"] == 0
    assert len(row["apart_each"]) == 2 and row["together"] < row["apart"] == sum(row["apart_each"])
    assert 0 < row["planned"] < row["planned_apart"]
