"""Runs of the tiny model on several gloo processes, many in one start of the processes, which takes seconds."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

TINY = [
    "model=tiny", "data.max_rows=24", "data.max_validation_rows=4", "data.micro_batch_size=1", "logger=csv",
    "trainer.precision=32-true", "trainer.accelerator=cpu", "optimizer.lr=0.01", "validation.samples=0",
]  # fmt: skip


def train_on_ranks(count: int, folder: Path, runs: dict[str, list[str]], seconds: int = 600) -> None:
    """Train every run, named by its folder in `folder`, on so many processes. The limit is a busy machine's."""
    configs = [[*TINY, f"trainer.devices={count}", f"run_dir={folder}/{name}", *words] for name, words in runs.items()]
    file = folder / f"runs{count}.json"
    file.write_text(json.dumps(configs))
    program = Path(__file__).with_name("train_many.py")
    options = [f"--nproc-per-node={count}"] if count > 1 else []
    launcher = ["-m", "torch.distributed.run", "--standalone", *options] if count > 1 else []
    process = subprocess.run(
        [sys.executable, *launcher, str(program), str(file)],
        capture_output=True, text=True, timeout=seconds, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-4000:]


def rows(run_dir: Path) -> list[dict[str, float]]:
    """The optimiser steps in `metrics.csv`."""
    with (run_dir / "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file) if row["loss"]]


def column(run_dir: Path, name: str) -> list[float]:
    return [row[name] for row in rows(run_dir)]


def adapter(run_dir: Path) -> dict[str, Tensor]:
    return load_file(run_dir / "adapter" / "adapter_model.safetensors")


def result(run_dir: Path) -> dict[str, object]:
    return json.loads((run_dir / "result.json").read_text())
