"""`lightning-peft estimate`: the need of `train` with the same overrides, and the changes that lower it."""

import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_peft.adapters.registry import METHODS
from lightning_peft.checkpoint.atomic import write_text
from lightning_peft.command_configs.of_runs import EstimateConfig
from lightning_peft.commands.step_estimate import estimate_of, plan_of, with_fitting_checkpointing
from lightning_peft.data.datamodule import beyond_context
from lightning_peft.estimation.advice import smallest_change
from lightning_peft.estimation.memory import Estimate
from lightning_peft.models.loading import model_config, model_context, model_name
from lightning_peft.objectives.teacher import TaughtConfig
from lightning_peft.optim.optimizers import OPTIMIZERS
from lightning_peft.quantization.config import Kind
from lightning_peft.runs.machine import GIB
from lightning_peft.strict_json import json_text
from lightning_peft.training.config import ActivationCheckpointing, Compilation, StrategyKind

logger = logging.getLogger(__name__)


def estimate(config: EstimateConfig) -> dict[str, Any]:
    """Print the estimate and return what `output` holds. No weights, no tokenizer and no data are read."""
    machine = plan_of(config).machine
    config = with_fitting_checkpointing(config, machine)
    context = model_context(config.model)
    if context is not None and config.data.max_length > context:
        raise ValueError(beyond_context(config.data.max_length, context))
    found = estimate_of(config)
    limit = machine.memory(config.device_memory_gib)
    report: dict[str, Any] = {
        "model": model_name(config.model),
        "peak": found.peak,
        "phase": found.phase,
        **asdict(found),
        "usable": limit,
        "fits": None if limit is None else found.peak <= limit,
    }
    show(found, config)
    if limit is None:
        print("fits: not known, there is no GPU here; device_memory_gib=... names one")
    elif found.peak <= limit:
        print(f"fits: yes, {found.peak / GIB:.2f} of {limit / GIB:.2f} GiB usable")
    else:
        print(f"fits: no, {found.peak / GIB:.2f} of {limit / GIB:.2f} GiB usable")
        report |= advise(config, limit)
    if isinstance(config.objective, TaughtConfig):
        print("the teacher's own pass is not in the work of a step")
    if config.output is not None:
        write_text(Path(config.output), json_text(report))
    return report


def advise(config: EstimateConfig, limit: float) -> dict[str, Any]:
    """Find and print the smallest change with which the run fits."""
    peaks: dict[str, int] = {}

    def peak(config: EstimateConfig) -> int:
        key = repr(config)
        if key not in peaks:
            peaks[key] = estimate_of(config).peak
        return peaks[key]

    changed = smallest_change(config, changes(config), peak, limit)
    if changed is None:
        print("no change of micro batch, checkpointing, optimiser, quantisation or up to 8 ranks makes it fit")
        return {"change": None}
    words = difference(config, changed)
    print(f"fits with {' '.join(words)}: {peak(changed) / GIB:.2f} GiB")
    return {"change": words, "peak_after_change": peak(changed)}


def changes(config: EstimateConfig) -> list[Callable[[EstimateConfig], EstimateConfig | None]]:
    """Return the changes that save memory, least costly first: the same gradients in smaller pieces, recomputation,
    8-bit optimiser states, 4-bit weights, more devices."""
    rows = config.data.micro_batch_size
    halves = [rows // 2**power for power in range(1, rows.bit_length()) if rows % 2**power == 0]
    return [
        *(partial(with_rows, rows=half) for half in halves),
        *(partial(with_checkpointing, mode=mode) for mode in ("elementwise", "selective", "blocks")),
        with_8bit_optimizer,
        with_nf4,
        *(partial(with_ranks, ranks=ranks) for ranks in (2, 4, 8)),
    ]


def with_rows(config: EstimateConfig, rows: int) -> EstimateConfig | None:
    """Return a config with fewer rows at once and as many in a step; None where that cannot be."""
    before = config.data.micro_batch_size
    if rows >= before:
        return None
    accumulate = config.trainer.get("accumulate_grad_batches", 1) * (before // rows)
    return replace(
        config,
        data=replace(config.data, micro_batch_size=rows),
        trainer=config.trainer | {"accumulate_grad_batches": accumulate},
    )


def with_checkpointing(config: EstimateConfig, mode: str) -> EstimateConfig | None:
    order = ["none", "elementwise", "selective", "blocks"]
    wanted, now = ActivationCheckpointing[mode], config.activation_checkpointing.name
    if now not in order or order.index(mode) <= order.index(now):
        return None
    return replace(config, activation_checkpointing=wanted)


def with_8bit_optimizer(config: EstimateConfig) -> EstimateConfig | None:
    if OPTIMIZERS[config.optimizer.name].state_bits == 8:
        return None
    return replace(config, optimizer=replace(config.optimizer, name="adamw_8bit"))


def with_nf4(config: EstimateConfig) -> EstimateConfig | None:
    is_published = hasattr(model_config(config.model), "quantization_config")
    if is_published or config.quantization.is_on or METHODS[config.adapter.method].trains_all:
        return None
    return replace(config, quantization=replace(config.quantization, kind=Kind.nf4))


def with_ranks(config: EstimateConfig, ranks: int) -> EstimateConfig | None:
    if plan_of(config).ranks >= ranks:
        return None
    sharded = replace(config.strategy, kind=StrategyKind.fsdp)
    return replace(config, strategy=sharded, trainer=config.trainer | {"devices": ranks, "num_nodes": 1})


def difference(before: EstimateConfig, after: EstimateConfig) -> list[str]:
    """Return the overrides that lead from one config to the other."""
    settings: dict[str, Callable[[EstimateConfig], Any]] = {
        "data.micro_batch_size": lambda c: c.data.micro_batch_size,
        "trainer.accumulate_grad_batches": lambda c: c.trainer.get("accumulate_grad_batches", 1),
        "activation_checkpointing": lambda c: c.activation_checkpointing.name,
        "optimizer": lambda c: c.optimizer.name,
        "quantization": lambda c: c.quantization.kind.name,
        "strategy": lambda c: c.strategy.kind.name,
        "trainer.devices": lambda c: c.trainer.get("devices", 1),
    }
    return [f"{key}={value(after)}" for key, value in settings.items() if value(after) != value(before)]


def show(found: Estimate, config: EstimateConfig) -> None:
    """Print the table of components and the work of a step."""
    plan = plan_of(config)
    ranks = plan.ranks
    title = f"{found.peak / GIB:.2f} GiB at the peak of {'each rank' if ranks > 1 else 'the run'} ({found.phase})"
    table = Table(title=title, caption=found.legend, caption_justify="left", title_justify="left")
    for heading in ("", "at the peak", "largest"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    table.add_column("bytes", overflow="fold")
    for component in found.components:
        sizes = (f"{size / 2**20:,.1f} MiB" for size in (component.at_peak, component.largest))
        table.add_row(component.name, *sizes, component.formula)
    Console().print(table)
    phases = ", ".join(f"{phase} {size / GIB:.2f}" for phase, size in found.phases.items())
    print(f"peak of each phase in GiB: {phases}")
    print(
        f"a step of {found.tokens:,} tokens a rank: {found.flops / 1e12:,.3f} TFLOP, "
        f"{found.bytes_moved / GIB:,.1f} GiB read and written"
    )
    if found.host:
        print(f"in host memory: {found.host / GIB:.2f} GiB")
    if config.compile in (Compilation.blocks, Compilation.full) or plan.accelerator == "cuda":
        print("estimated for compile=none, the plain step")
