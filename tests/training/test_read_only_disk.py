"""The disk of a run turns read-only while it trains: one line, and what was saved is gone on from."""

import csv
from contextlib import ExitStack
from pathlib import Path

import pytest
from disks import read_only
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file
from tiny_runs import TINY

from lightning_peft.__main__ import main
from lightning_peft.runs.lock import LOCK

WORDS = ["train", *TINY, "trainer.max_steps=6", "checkpoint.every_n_steps=2", "data.max_rows=12"]
CHANGED = ExitStack()
"""What a run changes of its disk, to be undone by the test."""


class TurnsReadOnly(Callback):
    """Has the run's disk turn read-only behind a step."""

    def __init__(self, step: int, folder: str) -> None:
        self.step, self.folder = step, Path(folder)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            CHANGED.enter_context(read_only(self.folder))


class TakesTheName(Callback):
    """Has a folder stand where the result is to be written."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (self.folder / "result.json" / "in the way").mkdir(parents=True)


def steps_of(run: Path) -> list[str]:
    with (run / "metrics.csv").open() as file:
        return [row["step"] for row in csv.DictReader(file) if row["loss"]]


@pytest.mark.parametrize(("step", "file"), [(3, "step-00000004.ckpt"), (5, "step-00000006.ckpt")])
def test_disk_that_turns_read_only_ends_the_run_in_one_line(step, file, tmp_path, capsys):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert main([*WORDS, f"run_dir={whole}"]) == 0
    turns = [f"callbacks.turns._target_={__name__}.TurnsReadOnly", f"callbacks.turns.step={step}"]
    capsys.readouterr()
    with CHANGED:
        assert main([*WORDS, f"run_dir={run}", *turns, f"callbacks.turns.folder={run}"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == [
        f"error: {run}/checkpoints/{file}: cannot be saved (Read-only file system); what was there before is unchanged"
    ]
    said = [line for line in lines if "read-only" in line.lower()]
    assert len(said) == 2 and said[0].endswith(
        "metrics.csv: Read-only file system; rows wait in memory until they can be written"
    )

    assert (run / LOCK).exists()  # it could not be removed, and holds nobody off
    assert main([*WORDS, f"run_dir={run}", "resume=auto"]) == 0
    assert not (run / LOCK).exists() and steps_of(run) == steps_of(whole) == [str(n + 1) for n in range(6)]
    weights = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run, whole)]
    assert all((weights[0][name] == tensor).all() for name, tensor in weights[1].items())


def test_run_begun_while_an_error_is_handled_says_its_own(tmp_path, capsys):
    """A program that tries again after an error has that error in hand, and it is not one of this run."""
    words = [f"callbacks.takes._target_={__name__}.TakesTheName", f"callbacks.takes.folder={tmp_path / 'run'}"]
    try:
        raise MemoryError("of the run before")
    except MemoryError:
        code = main([*WORDS, f"run_dir={tmp_path / 'run'}", *words])
    assert code == 2
    assert "result.json" in capsys.readouterr().err.splitlines()[-1]
