"""What has to be right of the sweep of the docs: 36 trials of rank x alpha x rate x seed, a rung at step 4 of 12."""

import html
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from brute_force import Seen, expected_sentence, quantile, resampled, trials_of

from lightning_peft.__main__ import main
from lightning_peft.sweeps.sweep import Sweep

SWEPT = ["adapter.rank=2,4,8", "adapter.alpha=8,16", "optimizer.lr=1e-3,1e-2", "seed=0,1,2"]
WORDS = ["trainer.max_steps=12", "sweep.pruning=asha", "sweep.min_steps=4", "logger=csv"]


def check_pruned_sweep(folder: Path, sweep: Sweep, capsys) -> None:
    """Against the files of the trials: rungs, states, table, means, sentence and page."""
    files = trials_of(folder)
    assert len(files) == len(sweep.trials) == 36
    assert {trial.state for trial in sweep.trials} == {"paused", "finished"}
    for trial in sweep.trials:
        found = files[trial.name]
        last = 12 if trial.state == "finished" else 4
        assert found.steps == list(range(1, last + 1)), trial.name
        assert trial.rung_values == [found.losses[4]]
    order = [trial.name for trial in sweep.trials]
    ahead = sorted(order, key=lambda name: (files[name].losses[4], order.index(name)))[: 36 // 3]
    assert all(max(files[name].steps) == 12 for name in ahead)
    assert sum(len(found.steps) for found in files.values()) < 0.65 * 36 * 12

    assert main(["sweep", "table", str(folder), f"output_path={folder}/table.json"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    final = {name: found.losses[12] for name, found in files.items() if 12 in found.losses}
    best = min(final, key=final.__getitem__)
    assert f"best validation_loss: {final[best]:.6g} of {best}" in printed
    said = expected_sentence(files, lambda trial: (trial.alpha, trial.rate), 12)
    assert said in printed
    rows = {row["trial"]: row for row in json.loads((folder / "table.json").read_text())}
    for name, found in files.items():
        alike = [t for t in files.values() if (t.rank, t.alpha, t.rate) == (found.rank, found.alpha, found.rate)]
        losses = [t.losses[12] for t in alike if 12 in t.losses]
        assert len(alike) == 3 and rows[name]["seeds"] == len(losses)
        assert rows[name]["validation_loss"] == found.losses[max(found.steps)]
        assert rows[name]["validation_loss_mean"] == (pytest.approx(sum(losses) / len(losses)) if losses else None)
        if len(losses) > 1:
            means = resampled(losses)
            assert rows[name]["validation_loss_low"] == pytest.approx(quantile(means, 0.025))
            assert rows[name]["validation_loss_high"] == pytest.approx(quantile(means, 0.975))
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert said in html.unescape(page) and f"best validation_loss: {final[best]:.6g} of {best}" in page
    shown = table_of(page)
    assert shown.keys() == rows.keys()
    for name, row in rows.items():
        assert shown[name] == {key: "" if value is None else str(value) for key, value in row.items()}
    assert main(["sweep", "table", str(folder), f"output_path={folder}/map.svg"]) == 0
    check_heat_map((folder / "map.svg").read_text(), files)


def table_of(page: str) -> dict[str, dict[str, str]]:
    """Return the cells of the page's table, by trial and column, as they are sorted by."""
    table = page.partition('<table class="sortable">')[2].partition("</table>")[0]
    head = [html.unescape(cell) for cell in re.findall(r"<th>(.*?)</th>", table)]
    found = [re.findall(r'<td data-v="(.*?)">', row) for row in re.findall(r"<tr>(.*?)</tr>", table)[1:]]
    rows = [dict(zip(head, map(html.unescape, cells), strict=True)) for cells in found]
    return {row["trial"]: row for row in rows}


def check_heat_map(picture: str, files: dict[str, Seen]) -> None:
    """Look whether a cell has the mean over the seeds that reached the end, at the best rate."""
    texts = [text.text for text in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}text")]
    assert texts[0] == "validation_loss, mean over seed, best over lr"
    expected = []
    for rank in (2, 4, 8):
        for alpha in (8, 16):
            by_rate: dict[float, list[float]] = {}
            for trial in files.values():
                if (trial.rank, trial.alpha) == (rank, alpha) and 12 in trial.losses:
                    by_rate.setdefault(trial.rate, []).append(trial.losses[12])
            means = [sum(losses) / len(losses) for losses in by_rate.values()]
            expected.append(f"{min(means):.4g}" if means else "-")
    assert texts[2:] == ["8", "16", "2", *expected[:2], "4", *expected[2:4], "8", *expected[4:]]
