"""The step on a CUDA device, with random weights of real shapes. One command, under eight minutes, a JSON row a run:

    python -m benchmarks.gpu                     # every part
    python -m benchmarks.gpu --part lora qlora   # some of them
    python -m benchmarks.gpu --device cpu --shape tiny --tokens 64      # its logic, without a GPU

`benchmarks/gpu_wheels.sh` collects what a machine without a network lacks beside torch (2.11 or newer), transformers
(5.10 or newer), lightning, peft and their dependencies. No model and no data is read: `model.random_weights=true` draws
the weights on the device, tensor by tensor and quantised at once, rows are generated. The losses of runs that
learn the same are compared: one that is off by more than 2 % is named, and the command fails.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.ours import measure_runs, peak_gib
from benchmarks.results import FOLDER, Results
from benchmarks.rivals import measure_rival
from benchmarks.shapes import SHAPES, write_shape
from benchmarks.turns import WARM_UP_STEPS
from benchmarks.workloads import Workload


@dataclass
class Run:
    """One training on random weights: its shape, its rows, the words of `train`, and what it should reach."""

    shape: str
    rows: int
    tokens: int
    words: list[str] = field(default_factory=list)
    packed: bool = False
    steps: int = 8
    rival: str | None = None
    """The trainer, when it is not ours; it recomputes activations, without which it does not fit."""
    bar: dict[str, float] = field(default_factory=dict)
    """tokens_per_second at least, peak_gib at most."""

    @property
    def learning(self) -> str:
        """Return what decides the losses: runs that share it differ in speed and memory alone."""
        starts = ("method=", "rank=", "optimizer=", "quantization=", "adapter.")
        words = [word for word in self.words or LORA if word.startswith(starts)]  # a rival is given none
        return " ".join([self.shape, f"{self.rows}x{self.tokens}", f"packed={self.packed}", *words])


LORA = ["method=lora", "rank=r16", "target_modules=all_linear"]
QLORA = ["method=qlora", "rank=r16", "target_modules=all_linear", "optimizer=adamw_8bit"]
OFFLOAD = "activation_checkpointing=offload"
CONTEXTS = (16384, 32768, 65536, 131072)

PARTS: dict[str, dict[str, Run]] = {
    "lora": {
        "8B LoRA bf16": Run("llama_8b", 2, 4096, LORA, bar={"tokens_per_second": 12473}),
        "8B LoRA bf16, not compiled": Run("llama_8b", 2, 4096, [*LORA, "compile=none"]),
        "8B LoRA bf16, selective": Run("llama_8b", 2, 4096, [*LORA, "activation_checkpointing=selective"]),
        "8B LoRA NF4": Run("llama_8b", 2, 4096, [*LORA, "quantization=nf4"], bar={"tokens_per_second": 0.9 * 12473}),
    },
    "qlora": {
        "8B QLoRA packed": Run("llama_8b", 2, 2048, [*QLORA, OFFLOAD], packed=True, bar={"peak_gib": 7.4}),
    },
    "70b": {
        "70B QLoRA": Run("llama_70b", 1, 2048, [*QLORA, OFFLOAD], steps=4, bar={"peak_gib": 45e9 / 2**30}),
    },
    "peft": {"8B HF PEFT bf16": Run("llama_8b", 2, 4096, rival="peft", steps=5)},
    "dora": {"8B DoRA bf16": Run("llama_8b", 2, 4096, ["method=dora", "rank=r16", "target_modules=all_linear"])},
    "paged": {
        f"8B QLoRA r64, {name}": Run(
            "llama_8b", 2, 2048, ["method=qlora", "rank=r64", f"optimizer={name}", "activation_checkpointing=blocks"]
        )
        for name in ("adamw_8bit", "paged_adamw_8bit")
    },
    "context": {
        f"8B QLoRA r32, {tokens} tokens": Run(
            "llama_8b", 1, tokens, [*QLORA, "rank=r32", OFFLOAD, "adapter.dropout=0"], steps=WARM_UP_STEPS + 1
        )
        for tokens in CONTEXTS
    },
}  # fmt: skip
"""Published figures of others behind the bars: NeMo Automodel's LoRA on an H100, torchtune's QLoRA of 8B."""


def measure(run: Run, device: str, timeout: float) -> dict[str, Any]:
    """Train, in a process of its own. Raises RuntimeError when that fails, out of memory included."""
    workload = Workload(run.shape, run.rows, run.tokens, run.packed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        overrides = [
            *write_shape(run.shape, folder / "model"), *workload.write_rows(folder, run.steps), *run.words,
            f"trainer.accelerator={device}", "schedule=constant", "trainer.log_every_n_steps=100",
        ]  # fmt: skip
        if run.rival is not None:
            side = measure_rival(run.rival, overrides, run.steps, folder, timeout)
        else:
            side = measure_runs({"run": overrides}, run.steps, timeout)["run"]
    return side | {"peak_gib": peak_gib(side)}


def verdict(row: dict[str, Any], bar: dict[str, float]) -> dict[str, bool]:
    """Say which of the bars are met: a rate at least, a peak at most."""
    return {
        name: row[name] >= limit if name == "tokens_per_second" else row[name] <= limit for name, limit in bar.items()
    }


LARGEST_LOSS_GAP = 0.02
"""Share by which the losses of two runs on the same rows and weights may differ. Ours: bf16 rounds in other orders."""


def wrong_losses(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Name the runs whose losses are off the first run's on the same rows and weights, step by step."""
    told: list[str] = []
    first: dict[str, tuple[str, list[float]]] = {}
    for name, row in rows.items():
        if not row.get("losses"):
            continue
        reference_name, reference = first.setdefault(row["same_as"], (name, row["losses"]))
        gaps = [abs(a - b) / abs(b) for a, b in zip(row["losses"], reference, strict=False)]
        if max(gaps, default=0.0) > LARGEST_LOSS_GAP:
            told.append(f"{name}: losses are off those of {reference_name} by {max(gaps):.1%}")
    return told


def measure_part(runs: dict[str, Run], results: Results, device: str, ends: float) -> None:
    for name, run in runs.items():
        left = ends - time.monotonic()
        if left < 30:
            print(f"{name}: skipped, the time is up; --part runs it alone", flush=True)
            continue
        try:
            row = measure(run, device, left)
            row |= {"bar": run.bar, "met": verdict(row, run.bar)}
            row["same_as"] = run.learning
            print(
                f"{name}: {row['tokens_per_second']:,.0f} tokens/s, peak {row['peak_gib']:.2f} GiB"
                + "".join(f", {key} {'met' if met else 'MISSED'}" for key, met in row["met"].items()),
                flush=True,
            )
        except RuntimeError as error:
            if time.monotonic() >= ends:
                print(f"{name}: stopped, the time is up; --part runs it alone", flush=True)
                continue
            text = str(error)
            reason = "out of memory" if "out of memory" in text.lower() else text.strip().splitlines()[-1]
            row = {"failed": reason}
            print(f"{name}: {text if reason != 'out of memory' else reason}", flush=True)
        results.add(name, row)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=SHAPES, help="instead of each run's own")
    parser.add_argument("--tokens", type=int, help="instead of each run's own")
    parser.add_argument("--seconds", type=float, default=470, help="after which no further run starts")
    parser.add_argument("--output", type=Path, default=FOLDER / "gpu.json")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("skipped: this machine has no CUDA device (--device cpu --shape tiny runs the logic)")
        return 0
    settings = {"device": options.device, "shape": options.shape, "tokens": options.tokens}
    results = Results(options.output, settings)
    ends = time.monotonic() + options.seconds
    for part in options.part:
        runs = {
            name: replace(run, shape=options.shape or run.shape, tokens=options.tokens or run.tokens)
            for name, run in PARTS[part].items()
        }
        measure_part(runs, results, options.device, ends)
    for told in (wrong := wrong_losses(results.rows)):
        print(told, flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
