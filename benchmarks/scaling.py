"""The cost of a step as one thing grows, and the gain of each lever: time and memory of `lightning-peft train`.

    python benchmarks/scaling.py                        # all parts, with random weights of real shapes
    python benchmarks/scaling.py --part rank ladder

A run a row, one after the other; rows that are in the result file are not measured again.
"""

import argparse
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.ours import measure_runs, peak_gib
from benchmarks.results import FOLDER, Results
from benchmarks.shapes import SHAPES, write_shape
from benchmarks.workloads import Workload


@dataclass
class Point:
    """One run: rows of so many tokens, and what differs from LoRA of rank 16 on all linear layers."""

    rows: int = 4
    tokens: int = 512
    words: list[str] = field(default_factory=list)
    short_rows: bool = False
    packing: bool = True
    """Tokens of the short rows."""
    shape: str | None = None
    naive: list[str] = field(default_factory=list)
    """Parts of the step that are replaced by the plain formula: loss, adapter."""


def ladder() -> dict[str, Point]:
    """Return the points from the plain formulas on padded rows to the smallest step, one lever at a time."""
    plain = ["compile=none", "activation_checkpointing=none"]
    short = Point(1, 2048, plain, short_rows=True)
    # The row has as many samples as a packed row holds on average.
    padded = Point(8, 512, plain, short_rows=True, packing=False)
    levers = ["compile=blocks", "activation_checkpointing=blocks", "optimizer=adamw_8bit", "quantization=nf4"]
    names = ["compiled blocks", "checkpointed blocks", "8-bit optimiser", "NF4 base"]
    rungs = {
        "plain formulas, padded": replace(padded, naive=["loss", "adapter"]),
        "chunked loss": replace(padded, naive=["adapter"]),
        "fused adapters": padded,
        "packed": short,
        "norms and gates recomputed": replace(short, words=["compile=none"]),
    }
    return rungs | {name: replace(short, words=levers[: place + 1]) for place, name in enumerate(names)}


PARTS: dict[str, dict[str, Point]] = {
    "rank": {f"rank {rank}": Point(1, 512, [f"adapter.rank={rank}"]) for rank in (1, 4, 16, 64, 256)},
    "length": {f"1x{tokens}": Point(1, tokens) for tokens in (256, 512, 1024, 2048, 4096, 8192)},
    "micro batch": {f"{rows}x512": Point(rows, 512) for rows in (1, 2, 4, 8)},
    "model": {shape: Point(1, 512, shape=shape) for shape in ("smollm2_135m", "smollm2_360m")},
    "base": {
        f"1B {method}": Point(1, 256, [f"method={method}"], shape="llama_1b") for method in ("lora", "qlora", "qdora")
    },
    "ladder": ladder(),
}


def measure(point: Point, shape: str, steps: int) -> dict[str, float]:
    workload = Workload("", point.rows, point.tokens, packed=point.short_rows)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        words = [
            *write_shape(point.shape or shape, folder / "model"), "method=lora", "target_modules=all_linear",
            *workload.write_rows(folder, steps), *point.words, "schedule=constant",
        ]  # fmt: skip
        if not point.packing:
            words.append("data.packing=false")
        if point.naive:
            words.append(
                f"+callbacks.naive={{_target_:benchmarks.naive.PlainFormulas,parts:[{','.join(point.naive)}]}}"
            )
        side = measure_runs({"run": words}, steps)["run"]
    return {
        "step_seconds": side["step_seconds"],
        "tokens_per_second": side["tokens_per_second"],
        "peak_gib": peak_gib(side),
        "start_seconds": side["start_seconds"],
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shape", choices=SHAPES, default="smollm2_135m")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--longest", type=int, default=8192, help="leave out points with longer rows")
    parser.add_argument("--output", type=Path, default=FOLDER / "scaling.json")
    options = parser.parse_args(arguments)
    results = Results(options.output, {"shape": options.shape, "steps": options.steps})
    for part in options.part:
        for name, point in PARTS[part].items():
            key = f"{part}: {name}"
            if key in results.rows or point.tokens > options.longest:
                continue
            row = measure(point, options.shape, options.steps)
            results.add(key, row)
            print(f"{key}: {row['tokens_per_second']:,.0f} tokens/s, {row['peak_gib']:.3f} GiB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
