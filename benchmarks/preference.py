"""`lightning-peft train objective=dpo` beside TRL's DPOTrainer: the same pairs in the same steps, model and start.

    python benchmarks/preference.py

Both are processes of their own that take their steps in turn (`turns.py`). The rate is pairs by processor time, which
others on the machine disturb least; ratios are medians over neighbouring steps, without the first two and the last.
Losses of all steps must agree, or nothing is written.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.compare import COUNTED, ratio
from benchmarks.machine import fastest_dtype
from benchmarks.ours import peak_gib, train_command
from benchmarks.results import FOLDER, Results
from benchmarks.turns import WARM_UP_STEPS, run_in_turns
from benchmarks.workloads import write_model, write_steps
from lightning_peft.tasks.text_to_sql.rows import generate_preference

LEARNING_RATE = 2e-4
BETA = 0.1
SAME = {"float32": 1e-4, "bfloat16": 0.1}
"""Largest difference of the losses of a step, by dtype: the first is log 2 of both, later ones have what a step made of
rounding."""


def write_pairs(folder: Path, steps: int, max_length: int) -> list[str]:
    """Write `rows.jsonl`, pairs of text-to-SQL; return the words with which `train` reads them."""
    # No tokenizer makes fewer than 40 tokens of an answer with its prompt.
    found = [generate_preference(0, "train", False, number) for number in range(max(8, steps * max_length // 40))]
    lines = [json.dumps({key: row[key] for key in ("prompt", "chosen", "rejected")}) for row in found]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return [
        "objective=dpo", f"objective.beta={BETA}", "data=jsonl", f"data.train_path={folder}/rows.jsonl",
        "data.validation_fraction=0", f"data.max_length={max_length}", "data.micro_batch_size=1", "data.packing=true",
    ]  # fmt: skip


def compare(model: str, steps: int, max_length: int, rank: int, dtype: str) -> dict[str, Any]:
    """Run both in turn; return what `summarise` says of them."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_model(model, folder, rank)
        words = ["model=hf", f"model.path={folder}/model", *write_pairs(folder, steps, max_length)]
        write_steps(words, folder, steps)
        pairs = [len(step) // 2 for step in json.loads((folder / "steps.json").read_text())]
        overrides = [
            *words, "method=lora", f"adapter.rank={rank}", f"adapter.alpha={2 * rank}", "target_modules=all_linear",
            f"adapter.init_from={folder}/start", f"optimizer.lr={LEARNING_RATE}", "optimizer.weight_decay=0",
            "schedule=constant", "schedule.warmup_steps=0",
            f"trainer.precision={'bf16-true' if dtype == 'bfloat16' else '32-true'}",
        ]  # fmt: skip
        theirs = [sys.executable, "-m", "benchmarks.preference_rival", str(folder), "--lr", f"{LEARNING_RATE}",
                  "--beta", f"{BETA}", "--dtype", dtype]  # fmt: skip
        commands = {"trl": theirs, "ours": train_command(overrides, steps, folder / "run")}
        sides = run_in_turns(commands, steps, folder, timeout=7200)
    return summarise(sides, pairs, SAME[dtype])


def summarise(sides: dict[str, dict[str, Any]], pairs: list[int], largest: float) -> dict[str, Any]:
    """Return rates and peaks, with every step's seconds and loss. Raises RuntimeError where losses differ by more."""
    ours, theirs = sides["ours"], sides["trl"]
    distance = max(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True))
    if not distance <= largest:
        raise RuntimeError(f"losses differ by {distance:.3g}: {ours['losses']} and TRL's {theirs['losses']}")
    for side in sides.values():
        rates = [count / seconds for count, seconds in zip(pairs, side["cpu_seconds"], strict=True)]
        side["pairs_per_cpu_second"] = statistics.median(rates[COUNTED])
    return {
        "pairs": pairs,
        "speedup_in_cpu_seconds": ratio(theirs["cpu_seconds"], ours["cpu_seconds"]),
        "speedup": ratio(theirs["seconds"], ours["seconds"]),
        "memory_ratio": peak_gib(ours) / peak_gib(theirs),
        "largest_loss_difference": distance,
        **sides,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--model", default="smollm2_135m", help="an option of the group model that needs no path")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=512, help="a step is a packed row of twice as many tokens")
    parser.add_argument(
        "--dtypes", nargs="+", choices=list(SAME), help="float32 and, where the device has it, bfloat16"
    )
    parser.add_argument("--output", type=Path, default=FOLDER / "preference.json")
    options = parser.parse_args(arguments)
    if options.steps <= WARM_UP_STEPS + 1:
        parser.error(f"--steps={options.steps}: must be at least {WARM_UP_STEPS + 2}, or no step's time counts")
    fastest = fastest_dtype("cuda" if torch.cuda.is_available() else "cpu")
    settings = {
        "model": options.model, "rank": options.rank, "steps": options.steps, "max_length": options.max_length,
        "lr": LEARNING_RATE, "beta": BETA,
    }  # fmt: skip
    results = Results(options.output, settings)
    for dtype in options.dtypes or sorted({"float32", fastest}, reverse=True):
        name = f"dpo, trl, {dtype}"
        if name in results.rows:
            print(f"{name}: measured before", flush=True)
            continue
        row = compare(options.model, options.steps, options.max_length, options.rank, dtype)
        results.add(name, row)
        print(
            f"{name}: {row['speedup_in_cpu_seconds']:.2f}x the pairs by processor time ({row['speedup']:.2f}x by the "
            f"clock), {row['memory_ratio']:.2f}x the memory, losses within {row['largest_loss_difference']:.1e}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
