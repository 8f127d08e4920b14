"""Train the tiny model for thousands of steps with everything on: do memory, open files and threads stay flat?

    python benchmarks/soak.py [STEPS]

Checkpoints every 50 steps, validation with answers and a metric every 100, W&B offline, packed rows of ever new shapes;
5,000 steps unless told otherwise. Every 25 steps it notes the process's anonymous host memory, its open files and its
threads. The slope is that of a line through what comes after the first 500 steps, or the first half of fewer than
1,000.
Writes benchmarks/results/soak.json; exit status 1 above 1 MiB a 1,000 steps, or where files or threads grow.
"""

import json
import os
import statistics
import sys
import tempfile
import threading
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_peft.commands.train import train
from lightning_peft.compose import compose_config

STEPS, WARM_UP, EVERY = 5000, 500, 25
MOST_MIB = 1.0
"""Growth of host memory over 1,000 steps."""
RUN = [
    "model=tiny", "data.max_rows=200", "data.max_validation_rows=4", "data.packing=true", "data.max_length=512",
    "data.micro_batch_size=1", "trainer.precision=32-true", "trainer.accelerator=cpu", "validation.every_n_steps=100",
    "validation.samples=2", "validation.metrics=[execution_accuracy]", "validation.metric_rows=2",
    "validation.max_new_tokens=4", "validation.budget=null", "checkpoint.every_n_steps=50", "logger=wandb",
    "logger.wandb.mode=offline", "+callbacks.watch._target_=benchmarks.soak.Watch",
]  # fmt: skip
RESULT = Path(__file__).parent / "results" / "soak.json"
SEEN: list[tuple[int, float, int, int]] = []
"""(step, MiB, open files, threads)."""


class Watch(Callback):
    """A watch over what the process holds."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        if trainer.global_step % EVERY == 0:
            # The module is the one that Hydra imports, which is not the one that runs.
            from benchmarks import soak

            soak.SEEN.append((trainer.global_step, anonymous_mib(), len(os.listdir("/proc/self/fd")), thread_count()))


def anonymous_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) / 1024


def thread_count() -> int:
    return max(threading.active_count(), len(os.listdir("/proc/self/task")))


def main() -> int:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else STEPS
    with tempfile.TemporaryDirectory() as folder:
        result = train(compose_config("train", [*RUN, f"trainer.max_steps={steps}", f"run_dir={folder}/run"]))
    from benchmarks import soak

    warm_up = min(WARM_UP, steps // 2)
    seen = [row for row in soak.SEEN if row[0] > warm_up]
    line = statistics.linear_regression([row[0] for row in seen], [row[1] for row in seen])
    report = {
        "steps": result["steps"],
        "after_step": warm_up,
        "host_memory_mib": [seen[0][1], seen[-1][1]],
        "slope_mib_per_1000_steps": round(1000 * line.slope, 3),
        "open_files": [seen[0][2], max(row[2] for row in seen), seen[-1][2]],
        "threads": [seen[0][3], max(row[3] for row in seen), seen[-1][3]],
    }
    RESULT.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    is_flat = report["slope_mib_per_1000_steps"] < MOST_MIB
    return 0 if is_flat and seen[-1][2] <= seen[0][2] and seen[-1][3] <= seen[0][3] else 1


if __name__ == "__main__":
    sys.exit(main())
