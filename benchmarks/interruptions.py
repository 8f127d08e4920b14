"""Interrupts a tiny run at random moments, resumes it until it is finished, and compares it with one left alone.

    python benchmarks/interruptions.py [PREEMPTIONS [KILLS [SEED]]]

Preemptions are SIGTERM, SIGUSR1 and SIGUSR2 in turn, kills SIGKILL; 20 and 50 unless told otherwise. The run packs
its rows, accumulates gradients in windows that do not divide its epochs, draws dropout and validates. Adapters are
compared byte by byte, metrics.csv in everything but times and memory. Writes benchmarks/results/interruptions.json;
exit status 1 when a run differs.
"""

import csv
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from lightning_peft.commands.train import train
from lightning_peft.compose import compose_config
from lightning_peft.training.preemption import PREEMPTED, SIGNALS, nothing_to_lose

RUN = [
    "model=tiny", "data.max_rows=24", "data.max_validation_rows=4", "data.packing=true", "data.max_length=512",
    "data.micro_batch_size=1", "adapter.dropout=0.1", "optimizer.lr=0.01", "trainer.max_epochs=3",
    "trainer.accumulate_grad_batches=2", "trainer.precision=32-true", "trainer.accelerator=cpu",
    "validation.every_n_steps=4", "validation.samples=0", "checkpoint.every_n_steps=3", "logger=csv", "resume=auto",
]  # fmt: skip
TIMES = ("_seconds", "_per_second", "_gib")
"""Ends of the columns that no two runs have alike."""
RESULT = Path(__file__).parent / "results" / "interruptions.json"


def run(run_dir: Path) -> None:
    """What the command line does, without its imports: they are of the server this process is forked from."""
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    with nothing_to_lose():
        train(compose_config("train", [*RUN, f"run_dir={run_dir}"]))


def start(run_dir: Path) -> ForkServerProcess:
    process = multiprocessing.get_context("forkserver").Process(target=run, args=(run_dir,))
    process.start()
    return process


def outcome(run_dir: Path) -> tuple[dict[str, bytes], list[dict[str, str]]]:
    """Adapters by folder, and the rows of metrics.csv without times."""
    adapters = {
        name: (run_dir / name / "adapter_model.safetensors").read_bytes() for name in ("adapter", "adapter_best")
    }
    rows = list(csv.DictReader((run_dir / "metrics.csv").read_text().splitlines()))
    return adapters, [{key: value for key, value in row.items() if not key.endswith(TIMES)} for row in rows]


def disturbed_run(run_dir: Path, pending: list[signal.Signals], seconds: float, rng: random.Random) -> Counter[str]:
    """Run to the end, interrupted as long as `pending` has signals left; what happened how often."""
    seen: Counter[str] = Counter()
    while True:
        process = start(run_dir)
        number = pending[-1] if pending else None
        process.join(rng.uniform(0, seconds) if number is not None else None)
        if number is not None and process.is_alive():
            assert process.pid is not None
            os.kill(process.pid, number)
            process.join()
        if process.exitcode == 0:
            return seen
        assert number is not None, f"exit status {process.exitcode} without a signal, in {run_dir}"
        expected = -signal.SIGKILL if number is signal.SIGKILL else PREEMPTED
        # A signal that comes before the first line of `run` ends the process by itself.
        assert process.exitcode in (expected, -number), f"exit status {process.exitcode} after {number.name}"
        seen[number.name] += 1
        seen["after the first checkpoint"] += any((run_dir / "checkpoints").glob("step-*.ckpt"))
        pending.pop()


def main() -> int:
    preemptions, kills, seed = [*map(int, sys.argv[1:]), *(20, 50, 0)[len(sys.argv) - 1 :]]
    multiprocessing.set_forkserver_preload(["lightning_peft.commands.train", "lightning_peft.compose"])
    rng = random.Random(seed)
    pending = [SIGNALS[i % len(SIGNALS)] for i in range(preemptions)] + [signal.SIGKILL] * kills
    rng.shuffle(pending)
    with tempfile.TemporaryDirectory() as folder:
        undisturbed = Path(folder) / "undisturbed"
        start(undisturbed).join()  # imports as well
        started = time.perf_counter()
        start(Path(folder) / "timed").join()
        seconds = time.perf_counter() - started
        expected = outcome(undisturbed)
        seen: Counter[str] = Counter()
        runs = identical = 0
        while pending:
            run_dir = Path(folder) / f"run-{runs}"
            seen += disturbed_run(run_dir, pending, seconds, rng)
            runs += 1
            identical += outcome(run_dir) == expected
            print(f"{runs} runs, {identical} as if undisturbed; {len(pending)} signals left", flush=True)
    report = {
        "preemptions": sum(seen[number.name] for number in SIGNALS),
        "kills": seen["SIGKILL"],
        "by_signal": {number.name: seen[number.name] for number in (*SIGNALS, signal.SIGKILL)},
        "after_the_first_checkpoint": seen["after the first checkpoint"],
        "runs": runs,
        "runs_equal_to_the_undisturbed": identical,
        "rows_of_metrics_csv": len(expected[1]),
        "seed": seed,
    }
    RESULT.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    return 0 if identical == runs else 1


if __name__ == "__main__":
    sys.exit(main())
