"""Runs of the tiny model on several gloo processes, many in one start of the processes, which takes seconds."""

import csv
import json
from pathlib import Path

from safetensors.torch import load_file
from started import run_on_ranks
from torch import Tensor

TINY = [
    "model=tiny", "data.max_rows=24", "data.max_validation_rows=4", "data.micro_batch_size=1", "logger=csv",
    "trainer.precision=32-true", "trainer.accelerator=cpu", "optimizer.lr=0.01", "validation.samples=0",
]  # fmt: skip

NOISE = {"rtol": 5e-5, "atol": 5e-6}
"""fp32: sums over the ranks are taken in another order."""


def train_on_ranks(count: int, folder: Path, runs: dict[str, list[str]], seconds: int = 600) -> None:
    """Train every run, named by its folder in `folder`, on so many processes. The limit is a busy machine's."""
    configs = [[*TINY, f"trainer.devices={count}", f"run_dir={folder}/{name}", *words] for name, words in runs.items()]
    file = folder / f"runs{count}.json"
    file.write_text(json.dumps(configs))
    run_on_ranks(count, Path(__file__).with_name("train_many.py"), file, seconds=seconds)


def rows(run_dir: Path) -> list[dict[str, float]]:
    """Return the optimiser steps in `metrics.csv`."""
    with (run_dir / "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file) if row["loss"]]


def column(run_dir: Path, name: str) -> list[float]:
    return [row[name] for row in rows(run_dir)]


def adapter(run_dir: Path) -> dict[str, Tensor]:
    return load_file(run_dir / "adapter" / "adapter_model.safetensors")


def result(run_dir: Path) -> dict[str, object]:
    return json.loads((run_dir / "result.json").read_text())


KINDS = ("ddp", "fsdp")


def train_every_way(folder: Path, runs: dict[str, list[str]]) -> None:
    """Train two steps of every run by one process, by one that stops and resumes, and by two ranks of each kind.

    The runs are named NAME, NAME_halves and NAME_KIND; one process takes the micro batches of two ranks in each step.
    """
    by_one = ["strategy=single", "trainer.accumulate_grad_batches=2"]
    own = {name: [*words, "checkpoint.every_n_steps=1"] for name, words in runs.items()}
    train_on_ranks(1, folder, {name: [*words, *by_one, "trainer.max_steps=2"] for name, words in own.items()})
    for steps in (1, 2):
        halves = [*by_one, f"trainer.max_steps={steps}", "resume=auto"]
        train_on_ranks(1, folder, {f"{name}_halves": [*words, *halves] for name, words in own.items()})
    by_two = {
        f"{name}_{kind}": [*words, f"strategy={kind}", "trainer.max_steps=2"]
        for name, words in own.items()
        for kind in KINDS
    }
    train_on_ranks(2, folder, by_two)
