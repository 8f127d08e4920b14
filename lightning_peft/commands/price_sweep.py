"""The price of a sweep before any of it runs: memory, steps and hours of each trial, and where it fits."""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from lightning_peft import readable
from lightning_peft.checkpoint.atomic import write_text
from lightning_peft.cluster.job import ClusterError
from lightning_peft.cluster.partitions import Partition, find_partitions
from lightning_peft.command_configs.of_runs import EstimateConfig, PriceConfig
from lightning_peft.commands.step_estimate import estimate_of, memory_key, plan_of, with_fitting_checkpointing
from lightning_peft.config import TrainConfig
from lightning_peft.data.datamodule import SFTDataModule
from lightning_peft.estimation.memory import Estimate
from lightning_peft.models.loading import empty_model, load_tokenizer, model_context, model_name, model_vocabulary
from lightning_peft.models.packing_choice import packing_of
from lightning_peft.runs.machine import GIB, RESERVED
from lightning_peft.strict_json import json_text
from lightning_peft.sweeps.sweep import FINISHED, Sweep, read_result
from lightning_peft.training.config import ActivationCheckpointing
from lightning_peft.training.model_flops import PEAK_FLOPS, peak_flops
from lightning_peft.training.teacher import teacher_context

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Price:
    """The price of one trial."""

    trial: str
    peak: int
    """Bytes on each rank, `Estimate.peak`."""
    ranks: int
    accelerator: str
    steps: int
    tokens: float
    """Real tokens of all steps and ranks."""
    hours: float | None
    """Hours of the trial; None where nothing says how fast the trial is."""
    source: str
    """The source of its speed."""

    @property
    def device_hours(self) -> float | None:
        """Return the hours of all its GPUs, or of all its processes on CPUs."""
        return None if self.hours is None else self.hours * self.ranks


@dataclass(frozen=True)
class Measured:
    """The speed of a finished run."""

    run_dir: str
    kind: tuple[Any, ...]
    rank: int | None
    device: str
    tokens_per_second: float


def prices(sweep: Sweep, runs: Sequence[TrainConfig], config: PriceConfig) -> list[Price]:
    """Return the price of each trial. The rows are read and their tokens counted; no weights are read."""
    measured = list(finished_runs(config.measured))
    check_gpu(config.gpu, measured)
    estimates: dict[str, tuple[ActivationCheckpointing, Estimate]] = {}
    rows: dict[str, tuple[int, float]] = {}
    found = []
    names = [trial.name for trial in sweep.trials] or ["each trial"]
    for name, run in zip(names, runs, strict=True):
        planned = planned_run(run)
        plan = plan_of(planned)
        if (key := memory_key(planned)) not in estimates:
            fitting = with_fitting_checkpointing(planned, plan.machine)
            estimates[key] = fitting.activation_checkpointing, estimate_of(fitting)
        mode, estimate = estimates[key]
        planned = replace(planned, activation_checkpointing=mode)
        steps, tokens = length_of(planned, estimate, plan.ranks, rows)
        speed, source = speed_of(planned, estimate, plan.accelerator, plan.ranks, measured, config)
        hours = None if speed is None else tokens / speed / 3600
        found.append(Price(name, estimate.peak, plan.ranks, plan.accelerator, steps, tokens, hours, source))
    return found


def check_gpu(gpu: str | None, measured: Sequence[Measured]) -> None:
    """Raise ValueError for a GPU of which neither the peak is known nor a run was measured."""
    if gpu is None or peak_flops(gpu) is not None or any(is_same_device(each.device, gpu) for each in measured):
        return
    raise ValueError(
        f"price.gpu={gpu}: its peak is not known and no run in price.measured was on it; choose one of "
        f"{', '.join(PEAK_FLOPS)}"
    )


def planned_run(run: TrainConfig) -> EstimateConfig:
    """Return the run as `estimate` takes it, with the ranks that its cluster gives it."""
    values = {field.name: getattr(run, field.name) for field in fields(TrainConfig)}
    if run.cluster is not None:
        values["trainer"] = run.trainer | {"num_nodes": run.cluster.nodes, "devices": run.cluster.ranks_per_node}
        if run.cluster.gpus_per_node and run.trainer.get("accelerator", "auto") == "auto":
            values["trainer"]["accelerator"] = "gpu"
    return EstimateConfig(**values | {"cluster": None})


def length_of(
    run: EstimateConfig, estimate: Estimate, ranks: int, known: dict[str, tuple[int, float]]
) -> tuple[int, float]:
    """Return the optimiser steps of a run and the tokens in them."""
    max_steps, max_epochs = run.trainer.get("max_steps"), run.trainer.get("max_epochs")
    if run.data.streaming:
        assert max_steps is not None, "TrainConfig asks for it"
        return max_steps, float(max_steps * estimate.tokens * ranks)
    accumulate = run.trainer.get("accumulate_grad_batches", 1)
    of_teacher = teacher_context(run.objective, run.model)
    key = repr((run.model, run.data, run.seed, accumulate, of_teacher))
    if key not in known:
        packs = packing_of(run.data, empty_model(run.model))
        tokenizer = load_tokenizer(run.model)
        context, vocabulary = model_context(run.model), model_vocabulary(run.model, tokenizer)
        rows = replace(run.data, packing=packs)
        data = SFTDataModule(rows, tokenizer, run.seed, context, accumulate, vocabulary, of_teacher)
        data.setup()
        known[key] = data.steps_per_epoch, float(data.train_audit.tokens)
    steps_of_one_rank, tokens = known[key]
    steps_per_epoch = math.ceil(steps_of_one_rank / ranks)
    by_epochs = steps_per_epoch * (1 if max_epochs in (None, -1) else int(max_epochs))
    steps = by_epochs if max_steps in (None, -1) else int(max_steps)
    if max_steps not in (None, -1) and max_epochs not in (None, -1):
        steps = min(steps, by_epochs)
    return steps, steps * tokens / steps_per_epoch


def kind_of(run: TrainConfig, ranks: int) -> tuple[Any, ...]:
    """Return what runs of one speed have in common, whatever the adapter's rank is."""
    data, trainer = run.data, run.trainer
    return (
        model_name(run.model), run.method, run.quantization.kind.name, run.objective.name, data.max_length,
        data.micro_batch_size, trainer.get("accumulate_grad_batches", 1), str(trainer.get("precision")), ranks,
        run.strategy.kind.name, run.activation_checkpointing.name,
    )  # fmt: skip


def finished_runs(folders: Sequence[str]) -> Iterator[Measured]:
    """Yield the finished runs below some folders that say how fast they were and on what."""
    for folder in folders:
        for path in sorted(Path(folder).rglob("result.json")):
            result = read_result(path.parent)
            config = path.with_name("config.yaml")
            if result is None or result.get("status") != FINISHED or not config.exists():
                continue
            if not result.get("tokens_per_second") or not result.get("device"):
                continue
            saved: Any = OmegaConf.to_container(OmegaConf.load(config), resolve=True)
            kind, rank = kind_of_saved(saved)
            yield Measured(str(path.parent), kind, rank, result["device"], float(result["tokens_per_second"]))


def kind_of_saved(saved: dict[str, Any]) -> tuple[tuple[Any, ...], int | None]:
    """Return `kind_of` and the rank from a run's config.yaml, also of methods that are not known here."""
    data, trainer, model = saved["data"], saved["trainer"], saved["model"]
    ranks = trainer.get("devices", 1) * trainer.get("num_nodes", 1) if isinstance(trainer.get("devices"), int) else 1
    kind = (
        model.get("path") or model.get("name"), saved["method"], saved["quantization"]["kind"],
        saved.get("objective", {}).get("name", "sft"), data["max_length"], data["micro_batch_size"],
        trainer.get("accumulate_grad_batches", 1), str(trainer.get("precision")), ranks, saved["strategy"]["kind"],
        saved["activation_checkpointing"],
    )  # fmt: skip
    return kind, saved["adapter"].get("rank")


def speed_of(
    run: EstimateConfig,
    estimate: Estimate,
    accelerator: str,
    ranks: int,
    measured: Sequence[Measured],
    config: PriceConfig,
) -> tuple[float | None, str]:
    """Return tokens per second over all ranks, and where that comes from."""
    device = config.gpu or (torch.cuda.get_device_name() if torch.cuda.is_available() else None)
    device = "cpu" if accelerator == "cpu" else device
    kind = kind_of(run, ranks)
    alike = [each for each in measured if each.kind == kind and is_same_device(each.device, device)]
    exact = [each for each in alike if each.rank == run.adapter.rank]
    if alike:
        best = min(exact or alike, key=lambda each: abs((each.rank or 0) - (run.adapter.rank or 0)))
        other = "" if best.rank == run.adapter.rank else f", of rank {best.rank}"
        return best.tokens_per_second, f"measured in {best.run_dir}{other}"
    peak = peak_flops(device) if device is not None and device != "cpu" else None
    if peak is None:
        return None, "not known"
    per_token = estimate.flops / estimate.tokens
    return peak * config.utilization * ranks / per_token, f"modelled: {config.utilization:.0%} of {device}'s peak"


def is_same_device(one: str, other: str | None) -> bool:
    return other is not None and (one == other or (other != "cpu" and other.lower() in one.lower()))


def fits_in(price: Price, run: TrainConfig, partition: Partition) -> bool | None:
    """Return whether a trial's job can run in a partition; None where its GPUs do not say their memory."""
    per_node = run.cluster.ranks_per_node if run.cluster is not None else price.ranks
    nodes = run.cluster.nodes if run.cluster is not None else 1
    if partition.nodes < nodes:
        return False
    if price.accelerator == "cpu":
        return price.peak * per_node + RESERVED["cpu"] <= partition.memory_gib * GIB
    if partition.gpu is None or partition.gpus < per_node:
        return False
    return None if partition.gpu_gib is None else price.peak + RESERVED["cuda"] <= partition.gpu_gib * GIB


def show_prices(
    sweep: Sweep, runs: Sequence[TrainConfig], found: Sequence[Price], output: str | None = None
) -> dict[str, Any]:
    """Print what every trial and the whole sweep take, and which partitions they fit into; return the same."""
    try:
        partitions = find_partitions() if sweep.cluster == "slurm" else []
    except ClusterError as error:
        logger.info("partitions are not known: %s", error)
        partitions = []
    device = "GPU" if found[0].accelerator == "cuda" else "CPU process"
    columns = ["trial", "memory of a rank", "ranks", "steps", "tokens", "time", f"{device} hours", "speed"]
    columns += ["fits into"] if partitions else []
    table = Table(*columns)
    entries = []
    for price, run in zip(found, runs, strict=True):
        places: dict[str, list[str]] = {"yes": [], "no": [], "not known": []}
        for partition in partitions:
            fits = fits_in(price, run, partition)
            places["not known" if fits is None else "yes" if fits else "no"].append(partition.name)
        hours = price.device_hours
        row = [
            price.trial, f"{price.peak / GIB:.2f} GiB", str(price.ranks), readable.number(price.steps),
            readable.number(round(price.tokens)), "-" if price.hours is None else readable.duration(price.hours * 3600),
            "-" if hours is None else f"{hours:.3g}", price.source,
        ]  # fmt: skip
        if partitions:
            unknown = [f"{name}?" for name in dict.fromkeys(places["not known"])]
            row.append(", ".join([*dict.fromkeys(places["yes"]), *unknown]) or "none")
        table.add_row(*row)
        entries.append(asdict(price) | {"device_hours": hours, "partitions": places if partitions else None})
    Console(width=160 if not Console().is_terminal else None).print(table)
    count = sweep.count if len(found) < sweep.count else len(found)
    known = [price.device_hours for price in found if price.device_hours is not None]
    total = sum(known) * count / len(found) if len(known) == len(found) else None
    line = f"{count} trials"
    if total is None:
        line += "; hours are not known: no finished run like them in price.measured, and price.gpu names no GPU"
    else:
        line += f", {total:.3g} {device} hours"
        if sweep.parallel:
            days = sum(price.hours or 0.0 for price in found) * count / len(found) / sweep.parallel
            line += f", {readable.duration(days * 3600)} with {sweep.parallel} at a time"
    print(line + (f"; sweep.pruning={sweep.pruning} takes less" if sweep.pruning != "none" else ""))
    report = {"trials": entries, "count": count, "device_hours": total}
    if output is not None:
        write_text(Path(output), json_text(report))
    return report
