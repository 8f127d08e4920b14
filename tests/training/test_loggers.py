"""Each logger gets the run's scalars; Weights & Biases works with no network and no key."""

import csv

import pytest
from tiny_runs import tiny_config

from lightning_peft.commands.train import train
from lightning_peft.training.loggers import wandb_logger


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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_wandb_offline_needs_no_network_and_no_key(tmp_path, monkeypatch):
    for key in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(key, raising=False)
    for key in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "HOME"):
        monkeypatch.setenv(key, str(tmp_path))
    train(tiny_config(tmp_path / "run", "trainer.max_steps=2", "logger=wandb"))
    (record,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert record.stat().st_size > 0 and b"grad_norm" in record.read_bytes()


def test_unknown_wandb_mode_is_named(tmp_path):
    with pytest.raises(ValueError, match="logger.wandb.mode='cloud': must be auto, online or offline"):
        wandb_logger(str(tmp_path), "p", "cloud")
