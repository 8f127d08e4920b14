"""The cost of each method above the frozen floor: forward and input gradients of the base, with no adapters at all.

    python benchmarks/floor.py --variants frozen lora qlora dora

All variants live in one process and take their steps in turn, so that each ratio compares neighbours in time; the table
has medians. With `--clock cpu` and one thread it is the processor's own time, which a busy machine disturbs less.
Memory is the most a step has allocated at a time, above weights and optimiser states.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import fastest_dtype
from benchmarks.results import FOLDER, Results
from lightning_peft.adapters.inject import inject_adapters
from lightning_peft.adapters.registry import METHODS
from lightning_peft.data.batch import Batch
from lightning_peft.models.loading import load_model
from lightning_peft.models.source import ModelConfig
from lightning_peft.objectives.sft import SupervisedLoss
from lightning_peft.optim.optimizers import OptimizerConfig, build_optimizer
from lightning_peft.quantization.config import Kind, QuantizationConfig
from lightning_peft.training.host_memory import keep_freed_memory

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class Step:
    """One variant's training step: `frozen`, or a method's name; after a q, on an NF4 base."""

    def __init__(self, variant: str, options: argparse.Namespace):
        quantization = QuantizationConfig(kind=Kind.nf4) if variant.startswith("q") else None
        method = variant.removeprefix("q")
        torch.manual_seed(0)
        self.model = load_model(ModelConfig(name=options.model), getattr(torch, options.dtype), quantization)
        self.trained: list[nn.Parameter] = []
        if method == "frozen":
            self.model.requires_grad_(False)
            # Without a gradient to the first block's input there would be no backward pass at all.
            self.model.get_input_embeddings().register_forward_hook(_require_gradient)
        else:
            inject_adapters(self.model, METHODS[method].config(method=method, rank=options.rank))
            named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
            self.trained = [p for _, p in named]
            self.optimizer = build_optimizer(named, OptimizerConfig())
        self.objective = SupervisedLoss(self.model).train()

    def __call__(self, batch: Batch) -> Tensor:
        loss = self.objective(batch)
        (loss / batch.num_supervised).backward()
        if self.trained:
            nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach()


def _require_gradient(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.requires_grad_()


def random_batch(vocabulary: int, rows: int, tokens: int) -> Batch:
    """Draw rows of one sample each, every token supervised."""
    input_ids = torch.randint(0, vocabulary, (rows, tokens))
    labels = input_ids.clone()
    labels[:, 0] = -100
    positions = torch.arange(tokens).expand(rows, -1)
    bounds = torch.arange(0, rows * tokens + 1, tokens, dtype=torch.int32)
    return Batch(input_ids, labels, positions, bounds, tokens, rows * tokens, rows * (tokens - 1))


def peak_allocation(run: Callable[[], Any]) -> int:
    """Measure the bytes that `run` has allocated at its worst moment, above what there was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    held = peak = 0
    for event in recorded.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def measure(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Measure the seconds of every repeat and peak MiB of each variant."""
    steps = {variant: Step(variant, options) for variant in options.variants}
    vocabulary = next(iter(steps.values())).model.config.get_text_config().vocab_size
    batch = random_batch(vocabulary, options.rows, options.tokens)
    keep_freed_memory()  # `train` does the same
    for step in steps.values():
        step(batch)  # first calls allocate more, the optimiser's states among it
    peaks = {variant: peak_allocation(partial(step, batch)) for variant, step in steps.items()}
    clock = CLOCKS[options.clock]
    seconds: dict[str, list[float]] = {variant: [] for variant in steps}
    for _ in range(options.repeats):
        for variant, step in steps.items():
            started = clock()
            step(batch)
            seconds[variant].append(clock() - started)
    return {variant: {"seconds": seconds[variant], "peak_mib": peaks[variant] / 2**20} for variant in steps}


def ratio(seconds: list[float], reference: list[float]) -> float:
    """Return the median of the ratios of neighbouring repeats."""
    return statistics.median(a / b for a, b in zip(seconds, reference, strict=True))


def show(rows: dict[str, dict[str, Any]], tokens: int) -> None:
    """Print a table of the variants against the first one and against LoRA, where it is among them."""
    first, *_ = rows
    table = Table("variant", "s/step", "tokens/s", f"x {first}", "x lora", "step MiB", f"MiB x {first}")
    for name, row in rows.items():
        median = statistics.median(row["seconds"])
        to_lora = f"{ratio(row['seconds'], rows['lora']['seconds']):.3f}" if "lora" in rows else "-"
        to_first = f"{ratio(row['seconds'], rows[first]['seconds']):.3f}"
        memory = f"{row['peak_mib']:.1f}", f"{row['peak_mib'] / rows[first]['peak_mib']:.3f}"
        table.add_row(name, f"{median:.3f}", f"{tokens / median:.0f}", to_first, to_lora, *memory)
    Console().print(table)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    bases = ["frozen", *(name for name, method in METHODS.items() if method.layers and method.config.uses_rank)]
    variants = [prefix + base for prefix in ("", "q") for base in bases]
    parser.add_argument("--variants", nargs="+", choices=variants, default=["frozen", "lora", "qlora", "dora"])
    parser.add_argument("--model", default="smollm2_135m")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=fastest_dtype("cpu"))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--output", type=Path, default=FOLDER / "floor.json")
    options = parser.parse_args(arguments)
    # The JSON says how: a file of other settings is refused before anything is measured.
    results = Results(options.output, {k: v for k, v in vars(options).items() if k not in ("output", "variants")})
    rows = measure(options)
    for name, row in rows.items():
        results.add(name, row)
    show(rows, options.rows * options.tokens)


if __name__ == "__main__":
    main()
