"""Trials that train together on one base: a step of all beside each alone, and beside one LoRA of the summed rank.

    python benchmarks/together.py

Processor time of one thread, the ways in turn, ratios of neighbours and their median. A step is forward, backward,
clipping and optimiser; each trial has one row of its own tokens. `alone` runs the trials one after the other on the
same base, `one_lora` one adapter of the summed rank on all tokens. Memory is the most a step has allocated at a time.

On a 1.2 B NF4 base eight trials are trained for real, by one `train -m sweep.together=8` and by eight `train`, one
after the other. Memory is the most anonymous memory (RssAnon) that a process has held, imports included, looked at
every two milliseconds; of the eight it is the sum. Beside it stands what the planner says. --parts takes some of it;
--apart=N runs N of the eight, as they differ by nothing but their learning rate, and takes their mean for the others.
"""

import argparse
import csv
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.floor import peak_allocation, random_batch, ratio
from benchmarks.machine import fastest_dtype
from benchmarks.memory import anonymous_bytes
from benchmarks.results import FOLDER, Results
from benchmarks.shapes import write_shape
from lightning_peft.adapters.inject import inject_adapters
from lightning_peft.adapters.lora import LoRAConfig
from lightning_peft.command_configs.of_runs import EstimateConfig
from lightning_peft.commands.step_estimate import estimate_of
from lightning_peft.compose import compose_config
from lightning_peft.data.batch import Batch
from lightning_peft.models.loading import load_model
from lightning_peft.models.source import ModelConfig
from lightning_peft.models.twin import copy_around_same_tensors
from lightning_peft.objectives.sft import SFTConfig, SupervisedLoss
from lightning_peft.optim.optimizers import OptimizerConfig, build_optimizer
from lightning_peft.training.host_memory import keep_freed_memory
from lightning_peft.training.shared_passes import SharedPasses, trained_parameters
from lightning_peft.training.together import RunGroup, random_states
from lightning_peft.training.together_module import CheckedLoss

RANKS, RATES = (4, 8, 16, 32), (1e-3, 5e-4, 2e-4, 1e-4)
LARGE = [
    "method=qlora", "rank=r16", "data.micro_batch_size=1", "trainer.accelerator=cpu",
    "trainer.precision=bf16-true",
]  # fmt: skip
MEMORY = {
    "1.2 B NF4 base, 128 tokens": ["data.max_length=128"],
    "1.2 B NF4 base, 512 tokens, blocks": ["data.max_length=512", "activation_checkpointing=blocks"],
}
IMPORTS_BYTES = 400 * 2**20
"""Anonymous memory of a process after its imports, which the planner leaves out; measured."""
STEPS, SECONDS_BETWEEN_LOOKS = 2, 0.002
RUN = [
    f"trainer.max_steps={STEPS}", "data=jsonl", "data.text_column=text", "data.validation_fraction=0", "logger=csv",
    "checkpoint.every_n_steps=null",
]  # fmt: skip
WORDS = "the quick brown fox jumps over the lazy dog and runs into a small wood behind".split()
PARTS = ("steps", "memory")


class Trained:
    """A model's adapters with their optimiser."""

    def __init__(self, model: nn.Module, rate: float):
        self.parameters = trained_parameters(model)
        named = [(str(number), parameter) for number, parameter in enumerate(self.parameters)]
        self.optimizer = build_optimizer(named, OptimizerConfig(lr=rate))

    def step(self, loss: Tensor, tokens: int) -> None:
        (loss / tokens).backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Ways:
    """The ways to take a step of all trials."""

    def __init__(self, base: Any, batches: Sequence[Batch]):
        self.batches = batches
        self.group = RunGroup([str(rank) for rank in RANKS])
        self.group.base.template = base
        self.members, self.losses = [], []
        for member, rank, rate in zip(self.group.members, RANKS, RATES, strict=True):
            for kind in ("together", "alone"):
                torch.manual_seed(rank)
                model = copy_around_same_tensors(base)
                inject_adapters(model, LoRAConfig(rank=rank))
                if kind == "together":
                    member.model, member.loss = model, CheckedLoss(model, "auto", SFTConfig())
                    self.members.append(Trained(model, rate))
                else:
                    self.losses.append((SupervisedLoss(model).train(), Trained(model, rate)))
        checked = self.losses[0][0]
        checked.check(batches[0])
        assert self.group.members[0].loss is not None
        self.group.members[0].loss.logit_path = checked.logit_path
        self.passes = SharedPasses(self.group.base, self.group.members)
        model = copy_around_same_tensors(base)
        inject_adapters(model, LoRAConfig(rank=sum(RANKS)))
        self.one = SupervisedLoss(model).train(), Trained(model, RATES[-1])
        ids, labels, positions = (
            torch.cat([getattr(batch, name) for batch in batches]) for name in ("input_ids", "labels", "position_ids")
        )
        width = ids.shape[1]
        bounds = torch.arange(0, ids.numel() + 1, width, dtype=torch.int32)
        self.all = Batch(ids, labels, positions, bounds, width, ids.numel(), sum(b.num_supervised for b in batches))

    def together(self) -> list[float]:
        for member, batch in zip(self.group.members, self.batches, strict=True):
            member.batch, member.random = batch, random_states()
        answers = self.passes.take(self.group.members)
        for trained, answer, batch in zip(self.members, answers, self.batches, strict=True):
            trained.step(answer.as_loss(), batch.num_supervised)
        return [float(answer.loss) / batch.num_supervised for answer, batch in zip(answers, self.batches, strict=True)]

    def alone(self) -> list[float]:
        found = []
        for (objective, trained), batch in zip(self.losses, self.batches, strict=True):
            loss = objective(batch)
            trained.step(loss, batch.num_supervised)
            found.append(float(loss.detach()) / batch.num_supervised)
        return found

    def one_lora(self) -> None:
        objective, trained = self.one
        trained.step(objective(self.all), self.all.num_supervised)


def measure(base: Any, tokens: int, repeats: int) -> dict[str, Any]:
    torch.manual_seed(tokens)
    vocabulary = base.config.get_text_config().vocab_size
    ways = Ways(base, [random_batch(vocabulary, 1, tokens) for _ in RANKS])
    runs: dict[str, Callable[[], Any]] = {name: getattr(ways, name) for name in ("together", "alone", "one_lora")}
    together, alone = ways.together(), ways.alone()
    ways.one_lora()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            started = time.process_time()
            run()
            seconds[name].append(time.process_time() - started)
    return {
        "cpu_seconds": seconds,
        "alone_over_together": ratio(seconds["alone"], seconds["together"]),
        "together_over_one_lora": ratio(seconds["together"], seconds["one_lora"]),
        "first_losses_differ_by": max(abs(a - b) for a, b in zip(together, alone, strict=True)),
        "peak_mib": {name: peak_allocation(run) / 2**20 for name, run in runs.items()},
    }


def memory(shape: str, trials: int, processes: int, words: Sequence[str]) -> dict[str, Any]:
    """Return the bytes of one process with so many trials and of so many processes, measured and planned."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_shape(shape, folder / "model")
        common = [*model, *LARGE, *words]
        config: EstimateConfig = compose_config("estimate", common)
        planned = estimate_of(config, trials).peak + IMPORTS_BYTES
        planned_apart = trials * (estimate_of(config).peak + IMPORTS_BYTES)
        run = [*common, *RUN, f"data.train_path={write_texts(folder / 'texts.jsonl')}"]
        rates = [f"{number + 1}e-4" for number in range(trials)]
        swept = ["-m", f"optimizer.lr={','.join(rates)}", f"sweep.together={trials}", f"run_dir={folder / 'together'}"]
        together = peak_of_training([*run, *swept])
        apart, differences = [], []
        for rate in rates[:processes]:
            alone = folder / "apart" / rate
            apart.append(peak_of_training([*run, f"optimizer.lr={rate}", f"run_dir={alone}"]))
            differences.append(abs(first_loss(alone) - first_loss(folder / "together" / f"lr{rate}")))
        of_all = statistics.mean(apart) * trials
    return {
        "trials": trials,
        "shape": shape,
        "words": [*LARGE, *words],
        "steps": STEPS,
        "together": together,
        "apart": of_all,
        "apart_each": apart,
        "ratio": together / of_all,
        "planned": planned,
        "planned_apart": planned_apart,
        "first_losses_differ_by": max(differences),
    }


def write_texts(path: Path) -> Path:
    """Write rows of text of all lengths: a batch holds several samples, and never those of the one before."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 60))) for _ in range(512)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def peak_of_training(words: Sequence[str]) -> int:
    """Train in a process of its own and return the most anonymous memory in bytes that it has held."""
    command = [sys.executable, "-m", "lightning_peft", "train", *words]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
        peak = 0
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(SECONDS_BETWEEN_LOOKS)
        said.seek(0)
        if process.returncode:
            raise SystemExit(f"training failed: {' '.join(words)}\n{said.read()[-2000:]}")
    return peak


def first_loss(run_dir: Path) -> float:
    with (run_dir / "metrics.csv").open() as file:
        return float(next(csv.DictReader(file))["loss"])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2_135m")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 128, 512], help="of each trial")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=fastest_dtype("cpu"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shape", default="llama_1b", help="of the base whose memory is measured")
    parser.add_argument("--trials", type=int, default=8, help="on that base")
    parser.add_argument("--apart", type=int, help="of these trials trained apart; all where it is left out")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of together.json and together_memory.json")
    options = parser.parse_args(arguments)
    if "memory" in options.parts:
        apart = options.apart or options.trials
        sizes = {"shape": options.shape, "trials": options.trials, "apart": apart, "steps": STEPS}
        results = Results(options.folder / "together_memory.json", sizes)
        for name, words in MEMORY.items():
            if name not in results.rows:
                results.add(name, memory(options.shape, options.trials, apart, words))
        show_memory(results.rows)
    if "steps" in options.parts:
        measure_steps(options)


def measure_steps(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    settings = {"model": options.model, "dtype": options.dtype, "repeats": options.repeats, "ranks": list(RANKS)}
    results = Results(options.folder / "together.json", settings)
    base = load_model(ModelConfig(name=options.model), getattr(torch, options.dtype)).requires_grad_(False)
    for tokens in options.tokens:
        if (name := f"{tokens} tokens a trial") not in results.rows:
            results.add(name, measure(base, tokens, options.repeats))
    show(results.rows)


def show(rows: dict[str, dict[str, Any]]) -> None:
    table = Table("", "together s", "alone s", "alone / together", "together / one LoRA", "step MiB", "alone MiB")
    for name, row in rows.items():
        medians = {way: statistics.median(row["cpu_seconds"][way]) for way in ("together", "alone")}
        table.add_row(
            name, f"{medians['together']:.2f}", f"{medians['alone']:.2f}", f"{row['alone_over_together']:.2f}",
            f"{row['together_over_one_lora']:.2f}", *(f"{row['peak_mib'][way]:.0f}" for way in ("together", "alone")),
        )  # fmt: skip
    Console().print(table)


def show_memory(rows: dict[str, dict[str, Any]]) -> None:
    for name, row in rows.items():
        sizes = (row[key] / 2**30 for key in ("together", "apart", "planned", "planned_apart"))
        together, apart, planned, planned_apart = (f"{size:.2f}" for size in sizes)
        print(
            f"{row['trials']} trials, {name}: {together} GiB together ({planned} planned), {apart} in processes "
            f"({planned_apart}): {row['ratio']:.3f}"
        )


if __name__ == "__main__":
    main()
