"""The cost of a step above the frozen base."""

import json

import torch

from benchmarks.floor import main, peak_allocation, ratio


def test_peak_is_the_most_held_at_once():
    def run():
        first = torch.empty(1000, dtype=torch.uint8)
        del first
        return torch.empty(1500, dtype=torch.uint8), torch.empty(500, dtype=torch.uint8)

    assert peak_allocation(run) == 2000


def test_ratio_is_of_neighbours():
    # The machine slows down threefold on the way; each pair still says 1.5.
    assert ratio([1.5, 3.0, 4.5], [1.0, 2.0, 3.0]) == 1.5


def test_variants_are_measured_in_one_run(tmp_path, capsys):
    words = ["--model", "tiny", "--rank", "2", "--rows", "1", "--tokens", "16", "--repeats", "2"]
    main([*words, "--variants", "frozen", "lora", "qlora", "--output", f"{tmp_path}/floor.json"])
    rows = json.loads((tmp_path / "floor.json").read_text())["rows"]
    assert list(rows) == ["frozen", "lora", "qlora"]
    assert all(len(row["seconds"]) == 2 for row in rows.values())
    assert 0 < rows["frozen"]["peak_mib"] < rows["lora"]["peak_mib"]
    printed = capsys.readouterr().out
    assert "x lora" in printed and "qlora" in printed
