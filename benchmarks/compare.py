"""`lightning-peft train` beside the other trainers: same model, rows, order, dtype, optimiser, rank, targets and start.

    python benchmarks/compare.py                              # all workloads, all rivals that run here
    python benchmarks/compare.py --workload 4x512 --rivals peft

Each side is a process of its own; they take their steps in turn (`turns.py`). A rate is a median over steps, a ratio
the median of the ratios of neighbouring ones, both without the first two and the last.
"""

import argparse
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import fastest_dtype
from benchmarks.ours import peak_gib, train_command
from benchmarks.results import FOLDER, Results
from benchmarks.rivals import RIVALS, rival_command, why_not
from benchmarks.turns import WARM_UP_STEPS, run_in_turns
from benchmarks.workloads import WORKLOADS, Workload, write_model, write_steps

LEARNING_RATE = 2e-4
REFERENCE = "HF PEFT in fp32"
COUNTED = slice(WARM_UP_STEPS, -1)
"""Steps whose times count. The last one's has the end of the training in it: `train` saves, a rival leaves its loop."""


def prepare(folder: Path, workload: Workload, steps: int, model: str, rank: int) -> tuple[list[str], int]:
    """Write model, rows, steps and starting adapter; the words with which `train` reads them, and the tokens of all."""
    write_model(model, folder, rank)
    words = ["model=hf", f"model.path={folder}/model", *workload.write_rows(folder, steps)]
    return words, write_steps(words, folder, steps)


def reference_losses(workload: Workload, steps: int, model: str, rank: int) -> list[float]:
    """Compute the losses of HF PEFT in fp32, which those of bf16 are measured against."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder, workload, steps, model, rank)
        command = rival_command("peft", folder, LEARNING_RATE, torch.float32)
        losses: list[float] = run_in_turns({"peft": command}, steps, folder)["peft"]["losses"]
    return losses


def compare(
    workload: Workload, rival: str, steps: int, model: str, rank: int, dtype: torch.dtype, reference: list[float]
) -> dict[str, Any]:
    """Run one rival on one workload, and ours beside it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        words, tokens = prepare(folder, workload, steps, model, rank)
        overrides = [
            *words, "method=lora", f"adapter.rank={rank}", f"adapter.alpha={2 * rank}", "target_modules=all_linear",
            f"adapter.init_from={folder}/start",
            f"optimizer.lr={LEARNING_RATE}", "optimizer.weight_decay=0", "schedule=constant", "schedule.warmup_steps=0",
            f"trainer.precision={'bf16-true' if dtype is torch.bfloat16 else '32-true'}",
        ]  # fmt: skip
        sides = run_in_turns(
            {
                rival: rival_command(rival, folder, LEARNING_RATE, dtype),
                "ours": train_command(overrides, steps, folder / "run"),
            },
            steps,
            folder,
        )
    return summarise(sides, rival, tokens / steps, reference)


def summarise(
    sides: dict[str, dict[str, Any]], rival: str, tokens_per_step: float, reference: list[float]
) -> dict[str, Any]:
    """Return the rates, peaks and what ours has over the rival, with every step's seconds and loss."""
    for side in sides.values():
        side["largest_loss_error"] = max(abs(a - b) for a, b in zip(side["losses"], reference, strict=True))
        side["tokens_per_second"] = tokens_per_step / statistics.median(side["seconds"][COUNTED])
    ours, other = sides["ours"], sides[rival]
    return {
        "tokens_per_step": tokens_per_step,
        "speedup": ratio(other["seconds"], ours["seconds"]),
        # Other work of the machine disturbs this one less.
        "speedup_in_cpu_seconds": ratio(other["cpu_seconds"], ours["cpu_seconds"]),
        "memory_ratio": peak_gib(ours) / peak_gib(other),
        **sides,
    }


def ratio(theirs: list[float], ours: list[float]) -> float:
    """Return the median over neighbouring steps."""
    return statistics.median(a / b for a, b in list(zip(theirs, ours, strict=True))[COUNTED])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=list(RIVALS))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--model", default="smollm2_135m", help="an option of the group model that needs no path")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="bfloat16 where the device has it, by default")
    parser.add_argument("--again", action="store_true", help="measure rows that are in the result file as well")
    parser.add_argument("--output", type=Path, default=FOLDER / "compare.json")
    options = parser.parse_args(arguments)
    if options.steps <= WARM_UP_STEPS + 1:
        parser.error(f"--steps={options.steps}: must be at least {WARM_UP_STEPS + 2}, or no step's time counts")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, options.dtype or fastest_dtype(device))
    settings = {
        "model": options.model, "rank": options.rank, "target_modules": "all_linear", "steps": options.steps,
        "dtype": str(dtype).removeprefix("torch."), "device": device, "lr": LEARNING_RATE,
        "workloads": {name: asdict(workload) for name, workload in WORKLOADS.items()},
    }  # fmt: skip
    results = Results(options.output, settings)
    for name in options.workload:
        common = WORKLOADS[name], options.steps, options.model, options.rank
        # Compiled or not, the rows are the same.
        reference = f"{name.removesuffix(' compiled')}, {REFERENCE}"
        if reference not in results.rows:
            results.add(reference, {"losses": reference_losses(*common)})
            print(f"{reference}: measured", flush=True)
        for rival in options.rivals:
            key = f"{name}, {rival}"
            if reason := why_not(rival):
                print(f"{key}: skipped, {reason}", flush=True)
            elif key in results.rows and not options.again:
                print(f"{key}: measured before", flush=True)
            else:
                row = compare(WORKLOADS[name], rival, *common[1:], dtype, results.rows[reference]["losses"])
                results.add(key, row)
                print(
                    f"{key}: {row['speedup']:.2f}x the tokens/s ({row['speedup_in_cpu_seconds']:.2f}x by cpu time), "
                    f"{row['memory_ratio']:.2f}x the memory, "
                    f"losses off fp32's by {row['ours']['largest_loss_error']:.1e}, "
                    f"its own by {row[rival]['largest_loss_error']:.1e}",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
