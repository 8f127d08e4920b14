"""Interrupt tiny runs and sweeps at random moments, go on to their ends, and compare with undisturbed ones.

    python benchmarks/interruptions.py [PREEMPTIONS [KILLS [SEED]]]

Preemptions are SIGTERM, SIGUSR1 and SIGUSR2 in turn, kills SIGKILL; 20 and 50 unless told otherwise. The run packs
its rows, accumulates gradients in windows that do not divide its epochs, draws dropout, validates, answers questions
for a metric, and pauses at two rungs as a trial of a pruned sweep does. Then two pruned sweeps run side by side, one in
a folder of the other's, and a tenth of the signals, at least one of each kind, hit their trials. Adapters are compared
byte by byte, metrics.csv in everything but times and memory. Writes benchmarks/results/interruptions.json, or with
fewer signals interruptions_small.json; exit status 1 when a run differs.
"""

import contextlib
import csv
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from lightning_peft.__main__ import main as command
from lightning_peft.commands.train import train
from lightning_peft.compose import compose_config
from lightning_peft.config import TrainConfig
from lightning_peft.sweeps.sweep import FAILED, FINISHED, PAUSED, RUNNING, Sweep, Trial, changed_sweep, refresh
from lightning_peft.training.preemption import PREEMPTED, SIGNALS, nothing_to_lose

PREEMPTIONS, KILLS = 20, 50
RUN = [
    "model=tiny", "data.max_rows=24", "data.max_validation_rows=4", "data.packing=true", "data.max_length=512",
    "data.micro_batch_size=1", "adapter.dropout=0.1", "optimizer.lr=0.01", "trainer.max_epochs=3",
    "trainer.accumulate_grad_batches=2", "trainer.precision=32-true", "trainer.accelerator=cpu",
    "validation.every_n_steps=4", "validation.samples=0", "checkpoint.every_n_steps=3", "logger=csv", "resume=auto",
    "validation.metrics=[execution_accuracy]", "validation.metric_rows=2", "validation.max_new_tokens=4",
    "validation.budget=null", "validation.at_steps=[3,7]",
]  # fmt: skip
RUNGS = (3, 7, None)
SWEEP = [
    *(word for word in RUN if not word.startswith(("optimizer.lr", "trainer.max_epochs", "resume", "validation.at"))),
    "trainer.max_steps=9", "sweep.pruning=asha", "sweep.min_steps=3", "optimizer.lr=0.01,0.001,0.003", "cluster=local",
]  # fmt: skip
TIMES = ("_seconds", "_per_second", "_gib")
"""Ends of the columns that no two runs have alike."""
RESULTS = Path(__file__).parent / "results"


def run(config: TrainConfig) -> None:
    """Do what the command line does, without its imports: they are of the server this process is forked from."""
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    with nothing_to_lose():
        train(config)


def start(config: TrainConfig) -> ForkServerProcess:
    process = multiprocessing.get_context("forkserver").Process(target=run, args=(config,))
    process.start()
    return process


def config_of(run_dir: Path, pause_at: int | None = None) -> TrainConfig:
    return compose_config("train", [*RUN, f"run_dir={run_dir}", f"pause_at={'null' if pause_at is None else pause_at}"])


def outcome(run_dir: Path) -> tuple[dict[str, bytes], list[dict[str, str]]]:
    """Return the adapters by folder, and the rows of metrics.csv without times."""
    adapters = {
        name: (run_dir / name / "adapter_model.safetensors").read_bytes() for name in ("adapter", "adapter_best")
    }
    rows = list(csv.DictReader((run_dir / "metrics.csv").read_text().splitlines()))
    return adapters, [{key: value for key, value in row.items() if not key.endswith(TIMES)} for row in rows]


def disturbed_run(run_dir: Path, pending: list[signal.Signals], seconds: float, rng: random.Random) -> Counter[str]:
    """Run over both rungs to the end, interrupted as long as `pending` has signals; return what happened how often."""
    seen: Counter[str] = Counter()
    for rung in RUNGS:
        while True:
            process = start(config_of(run_dir, rung))
            number = pending[-1] if pending else None
            process.join(rng.uniform(0, seconds) if number is not None else None)
            is_told = number is not None and process.is_alive()
            if number is not None and is_told:
                assert process.pid is not None
                os.kill(process.pid, number)
                process.join()
            result = run_dir / "result.json"
            status = json.loads(result.read_text())["status"] if result.exists() else None
            is_there = process.exitcode == (0 if rung is None else PREEMPTED)
            is_there = is_there and status == ("finished" if rung is None else "paused")
            if not is_there:
                assert number is not None, f"exit status {process.exitcode} without a signal, in {run_dir}"
                expected = -signal.SIGKILL if number is signal.SIGKILL else PREEMPTED
                # A signal that comes before the first line of `run` ends the process by itself.
                assert process.exitcode in (expected, -number), f"exit status {process.exitcode} after {number.name}"
            if is_told and number is not None and not is_there:
                seen[number.name] += 1
                seen["after the first checkpoint"] += any((run_dir / "checkpoints").glob("step-*.ckpt"))
                pending.pop()
            if is_there:
                break
    return seen


def runs(folder: Path, pending: list[signal.Signals], rng: random.Random) -> dict[str, Any]:
    """Make runs that are interrupted until no signal is left."""
    undisturbed = folder / "undisturbed"
    start(config_of(undisturbed)).join()  # this imports as well
    started = time.perf_counter()
    start(config_of(folder / "timed")).join()
    seconds = time.perf_counter() - started
    expected = outcome(undisturbed)
    seen: Counter[str] = Counter()
    count = identical = 0
    while pending:
        run_dir = folder / f"run-{count}"
        seen += disturbed_run(run_dir, pending, seconds, rng)
        count += 1
        identical += outcome(run_dir) == expected
        print(f"{count} runs, {identical} as if undisturbed; {len(pending)} signals left", flush=True)
    return {
        "preemptions": sum(seen[number.name] for number in SIGNALS),
        "kills": seen["SIGKILL"],
        "by_signal": {number.name: seen[number.name] for number in (*SIGNALS, signal.SIGKILL)},
        "after_the_first_checkpoint": seen["after the first checkpoint"],
        "rungs_of_a_run": [rung for rung in RUNGS if rung is not None],
        "runs": count,
        "runs_equal_to_the_undisturbed": identical,
        "rows_of_metrics_csv": len(expected[1]),
    }


def look(folder: Path) -> Sweep:
    with changed_sweep(folder) as sweep:
        refresh(sweep, folder, {})
    return sweep


def is_over(sweep: Sweep) -> bool:
    return not any(worker.is_alive for worker in sweep.workers) and all(t.state != RUNNING for t in sweep.trials)


def training(sweep: Sweep, folder: Path) -> Trial | None:
    """Find a trial that takes steps now, in a process of its own."""
    workers = {worker.pid for worker in sweep.workers}
    found = (t for t in sweep.trials if t.process is not None and t.process.is_alive and t.process.pid not in workers)
    return next((trial for trial in found if (folder / trial.name / "metrics.csv").exists()), None)


def sweeps(folder: Path, pending: list[signal.Signals], rng: random.Random) -> dict[str, Any]:
    """Run two pruned sweeps at once, one below the other, whose trials are interrupted; killed ones are retried."""
    places = [folder / "sweep", folder / "sweep" / "inner"]
    seen: Counter[str] = Counter()
    with contextlib.redirect_stdout(io.StringIO()):
        for seed, place in enumerate(places):
            assert command(["submit", "-m", *SWEEP, f"seed={seed}", f"sweep_dir={place}"]) == 0
        while not all(is_over(look(place)) for place in places) or any(
            trial.state == FAILED for place in places for trial in look(place).trials
        ):
            time.sleep(rng.uniform(0.2, 2))
            place = rng.choice(places)
            sweep = look(place)
            trial = training(sweep, place)
            if pending and trial is not None and trial.process is not None:
                number = pending.pop()
                with contextlib.suppress(ProcessLookupError):
                    os.kill(trial.process.pid, number)
                    seen[number.name] += 1
            if is_over(sweep) and any(trial.state == FAILED for trial in sweep.trials):
                assert command(["sweep", "retry", str(place), "failed=true"]) == 0
    trials = identical = 0
    for place in places:
        sweep = look(place)
        assert {trial.state for trial in sweep.trials} == {FINISHED, PAUSED}, [t.state for t in sweep.trials]
        for trial in sweep.trials:
            alone = folder / "alone" / place.name / trial.name
            alone.mkdir(parents=True)
            shutil.copy(place / trial.name / "config.yaml", alone)  # a copy trains in its own folder
            start(compose_config("train", [f"config_path={alone / 'config.yaml'}"])).join()
            trials += 1
            identical += outcome(alone) == outcome(place / trial.name)
    print(f"{trials} trials of two sweeps, {identical} as if undisturbed", flush=True)
    return {
        "signals": dict(seen),
        "trials": trials,
        "trials_equal_to_the_undisturbed": identical,
        "starts": sum(trial.attempts for place in places for trial in look(place).trials),
    }


def signals_of(preemptions: int, kills: int, rng: random.Random) -> list[signal.Signals]:
    pending = [SIGNALS[i % len(SIGNALS)] for i in range(preemptions)] + [signal.SIGKILL] * kills
    rng.shuffle(pending)
    return pending


def main() -> int:
    preemptions, kills, seed = [*map(int, sys.argv[1:]), *(PREEMPTIONS, KILLS, 0)[len(sys.argv) - 1 :]]
    multiprocessing.set_forkserver_preload(["lightning_peft.commands.train", "lightning_peft.compose"])
    rng = random.Random(seed)
    preempted, killed = (max(1, count // 10) for count in (preemptions, kills))
    with tempfile.TemporaryDirectory() as folder:
        pending = signals_of(preemptions - preempted, kills - killed, rng)
        report: dict[str, Any] = {"seed": seed, "runs": runs(Path(folder), pending, rng)}
        report["two_sweeps_in_one_tree"] = sweeps(Path(folder), signals_of(preempted, killed, rng), rng)
    is_small = preemptions < PREEMPTIONS or kills < KILLS
    path = RESULTS / ("interruptions_small.json" if is_small else "interruptions.json")
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    one, two = report["runs"], report["two_sweeps_in_one_tree"]
    is_equal = one["runs"] == one["runs_equal_to_the_undisturbed"]
    return 0 if is_equal and two["trials"] == two["trials_equal_to_the_undisturbed"] else 1


if __name__ == "__main__":
    sys.exit(main())
