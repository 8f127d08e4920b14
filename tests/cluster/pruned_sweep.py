"""What has to be right of the sweep of the docs: 36 trials of rank x alpha x rate x seed, a rung at step 4 of 12."""

import html
import json
from pathlib import Path

import pytest
from brute_force import expected_sentence, quantile, resampled, trials_of

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
    page = html.unescape((folder / "report.html").read_text())
    assert said in page and f"best validation_loss: {final[best]:.6g} of {best}" in page
