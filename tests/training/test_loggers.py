"""Each logger gets the run's scalars; Weights & Biases works with no network and no key."""

import csv

import pytest
from tiny_runs import tiny_config

from lightning_peft.commands.train import train


def metrics(run_dir):
    return list(csv.DictReader((run_dir / "metrics.csv").read_text().splitlines()))


def test_csv_has_a_row_per_step(tmp_path):
    train(tiny_config(tmp_path / "run", "trainer.max_steps=3"))
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == ["1", "2", "3", "3"]
    assert all(float(row[key]) > 0 for row in rows[:3] for key in ("loss", "grad_norm", "tokens", "step_seconds"))


def test_tensorboard_gets_the_same_loss(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny_config(tmp_path / "run", "trainer.max_steps=2", "logger=tensorboard"))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    rows = metrics(tmp_path / "run")
    logged = [event.value for event in events.Scalars("loss")]
    assert logged == pytest.approx([float(row["loss"]) for row in rows if row["loss"]], rel=1e-6)


def test_no_logger_writes_no_metrics(tmp_path):
    train(tiny_config(tmp_path / "run", "trainer.max_steps=1", "logger=none"))
    assert not (tmp_path / "run" / "metrics.csv").exists()
