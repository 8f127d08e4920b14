"""Every method on one task: its gain, and the cost of a step beside LoRA's.

    python benchmarks/methods.py                 # trains and scores all methods, about four minutes each
    python benchmarks/methods.py --part time     # step time and peak memory beside LoRA's

Both parts go on where they were stopped: a method in the result file is not run again.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.ours import measure_runs, peak_gib
from benchmarks.results import FOLDER, Results
from benchmarks.turns import WARM_UP_STEPS
from benchmarks.workloads import Workload
from lightning_peft.compose import compose_config

METHODS = (
    "lora", "qlora", "dora", "qdora", "rslora", "lora_plus", "vera", "pissa", "olora", "eva", "loftq", "lora_fa",
    "adalora", "ia3", "intrinsic", "full", "hybrid_lora", "lr_lora", "lr_lora_gate", "balora", "molf", "molf_e",
)  # fmt: skip

LEARNING_RATE_FACTOR = 7.5
"""Factor of the learning rate of each method's option file. The files have the papers' rates for billions of weights
and thousands of steps; 7.5 is what recipe=lora/text_to_sql, tuned on this model and data, has over method=lora."""

HUNG_AFTER = 1800
"""Seconds after which a method is given up."""


def run_lightning_peft(log: Path, *words: str) -> None:
    """Run one command in a process of its own. Raises RuntimeError with the end of its output when it fails."""
    with log.open("a") as output:
        done = subprocess.run(
            [sys.executable, "-m", "lightning_peft", *words], stdout=output, stderr=output, timeout=HUNG_AFTER
        )
    if done.returncode != 0:
        raise RuntimeError(f"lightning-peft {' '.join(words)}:\n{log.read_text()[-2000:]}")


def learning_rate(method: str) -> float:
    return float(f"{compose_config('train', [f'method={method}']).optimizer.lr * LEARNING_RATE_FACTOR:.3g}")


def train_and_score(method: str, steps: int, rows: int, model: str, folder: Path) -> dict[str, Any]:
    """Train `method` for so many steps of 512 tokens and score it on so many unseen rows."""
    started = time.perf_counter()
    lr = learning_rate(method)
    run_lightning_peft(
        folder / "log.txt",
        "train", f"method={method}", f"model={model}", "data=text_to_sql", "schedule=linear", f"optimizer.lr={lr}",
        "schedule.warmup_steps=5", f"trainer.max_steps={steps}", "data.max_length=512", "data.micro_batch_size=1",
        f"data.max_rows={steps * 8}", f"data.max_validation_rows={min(rows, 64)}", "validation.samples=0",
        f"run_dir={folder}/run",
    )  # fmt: skip
    trained = time.perf_counter()
    run_lightning_peft(
        folder / "log.txt", "evaluate", f"adapter_path={folder}/run", f"max_rows={rows}", "models=adapter", "samples=0"
    )
    result = json.loads((folder / "run" / "result.json").read_text())
    scores = json.loads((folder / "run" / "evaluation.json").read_text())["adapter"]
    return {
        "trainable_parameters": result["trainable_parameters"],
        "learning_rate": lr,
        "train_loss": result["train_loss"],
        "validation_loss": scores["loss"],
        "execution_accuracy": scores["metrics"]["execution_accuracy"],
        "train_seconds": round(trained - started, 1),
        "evaluate_seconds": round(time.perf_counter() - trained, 1),
    }


def score_base(rows: int, adapter: Path) -> dict[str, Any]:
    """Score the model before training, which is shown three solved examples."""
    run_lightning_peft(
        adapter / "log.txt", "evaluate", f"adapter_path={adapter}/run", f"max_rows={rows}", "models=base", "samples=0"
    )
    scores = json.loads((adapter / "run" / "evaluation.json").read_text())["base"]
    return {"validation_loss": scores["loss"], "execution_accuracy": scores["metrics"]["execution_accuracy"]}


def measure_quality(methods: list[str], results: Results, steps: int, rows: int, model: str) -> list[str]:
    """Fill `results` with the methods it lacks; return the names of those that failed."""
    failed = []
    for method in methods:
        if method in results.rows and (method != "lora" or "base" in results.rows):
            print(f"{method}: measured before", flush=True)
            continue
        folder = Path(tempfile.mkdtemp(prefix=f"{method}-"))
        try:
            row = train_and_score(method, steps, rows, model, folder)
            if method == "lora":
                results.add("base", score_base(rows, folder))
            results.add(method, row)
            print(f"{method}: {json.dumps(row)}", flush=True)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            failed.append(method)
            print(f"{method}: failed\n{error}", file=sys.stderr, flush=True)
        finally:
            shutil.rmtree(folder)
    return failed


def measure_cost(methods: list[str], results: Results, workload: Workload, steps: int, model: str) -> list[str]:
    """Fill `results` with each method's step time and peak memory beside LoRA's, in turn with LoRA's steps."""
    failed = []
    for method in methods:
        if method == "lora" or method in results.rows:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            rows = workload.write_rows(Path(temporary), steps)
            common = [f"model={model}", "schedule=constant", "activation_checkpointing=none", *rows]
            try:
                sides = measure_runs({name: [f"method={name}", *common] for name in ("lora", method)}, steps)
            except RuntimeError as error:
                failed.append(method)
                print(f"{method}: {error}", file=sys.stderr, flush=True)
                continue
        lora, other = sides["lora"], sides[method]
        neighbours = list(zip(lora["seconds"], other["seconds"], strict=True))[WARM_UP_STEPS:]
        row = {
            "time_to_lora": statistics.median(theirs / mine for mine, theirs in neighbours),
            "memory_to_lora": peak_gib(other) / peak_gib(lora),
            "seconds": other["seconds"],
            "lora_seconds": lora["seconds"],
            "peak_gib": peak_gib(other),
            "lora_peak_gib": peak_gib(lora),
        }
        results.add(method, row)
        print(f"{method}: {row['time_to_lora']:.2f}x LoRA's time, {row['memory_to_lora']:.2f}x its memory", flush=True)
    return failed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--part", choices=("quality", "time"), default="quality")
    parser.add_argument("--steps", type=int, help="optimiser steps, 30 for quality and 7 for time")
    parser.add_argument("--rows", type=int, help="unseen rows to score on (64); for time, rows of a step (1)")
    parser.add_argument("--model", default="smollm2_135m", help="an option of the group model")
    parser.add_argument("--output", type=Path, help="methods.json, or methods_time.json")
    options = parser.parse_args(arguments)
    if options.part == "quality":
        steps, rows = options.steps or 30, options.rows or 64
        settings = {"model": options.model, "steps": steps, "tokens_per_step": 512, "rows": rows, "seed": 0}
        results = Results(options.output or FOLDER / "methods.json", settings)
        failed = measure_quality(options.methods, results, steps, rows, options.model)
    else:
        steps, rows = options.steps or 7, options.rows or 1
        settings = {"model": options.model, "steps": steps, "rows": rows, "tokens": 512}
        results = Results(options.output or FOLDER / "methods_time.json", settings)
        failed = measure_cost(options.methods, results, Workload("", rows, 512), steps, options.model)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
