"""Everything that is decided about a run before a weight is read, once, for `train`, `estimate` and `submit` alike."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from lightning_peft import distributed
from lightning_peft.adapters.registry import METHODS
from lightning_peft.config import TrainConfig
from lightning_peft.runs.machine import Machine
from lightning_peft.runs.nodes import check_nodes
from lightning_peft.runs.trainer_options import check_trainer_options, count_ranks, max_seconds
from lightning_peft.training.compilation import resolve_compilation
from lightning_peft.training.config import Compilation, StrategyKind
from lightning_peft.training.precision import resolve_precision, weight_dtype


@dataclass(frozen=True)
class RunPlan:
    """The way a run computes, and the devices it computes on."""

    machine: Machine
    precision: str
    """A key of `training.precision.DTYPES`."""
    weight_dtype: torch.dtype
    """dtype in which base weights are loaded."""
    compilation: Compilation
    """none, blocks or full; as asked for on a machine that is not this one."""
    devices: int
    """Ranks on a node."""
    nodes: int
    trains_all: bool
    """True where every weight is trained, and no adapter."""
    max_seconds: float | None
    """After so long a start is paused; None for no limit."""
    starts_ranks: bool
    """True where the ranks are to be started from this process."""
    is_rank: bool
    """True where this process is one of several ranks."""

    @property
    def accelerator(self) -> str:
        """Return cpu or cuda."""
        return self.machine.accelerator

    @property
    def ranks(self) -> int:
        """Return the number of processes that share the run."""
        return self.devices * self.nodes


def plan_run(config: TrainConfig, machine: Machine) -> RunPlan:
    """Decide how the run computes on the machine.

    Raises ValueError for trainer options that Lightning lacks or that contradict each other, for more ranks than the
    machine has devices or than were started, and for what several processes cannot do.
    """
    check_trainer_options(config.trainer)
    check_nodes(config)
    kind = config.strategy.kind
    trains_all = METHODS[config.adapter.method].trains_all
    requested = str(config.trainer.get("precision", "auto"))
    precision = resolve_precision(requested, machine.accelerator, machine.has_bf16, trains_all)
    devices, nodes = count_ranks(config.trainer, kind, machine)
    is_several = kind is not StrategyKind.single
    starts_ranks = machine.is_here and is_several and not distributed.are_ranks_started()
    check_strategy(config, precision)
    if config.model.attention == "flex_attention" and machine.accelerator == "cpu":
        raise ValueError("model.attention=flex_attention: has no gradient on a CPU; use auto, sdpa or eager")
    compilation = config.compile
    if machine.is_here:  # elsewhere nobody knows which compilers there are
        with logging_left_to_ranks(starts_ranks):
            compilation = resolve_compilation(config.compile, machine.accelerator, config.activation_checkpointing)
    return RunPlan(
        machine=machine,
        precision=precision,
        weight_dtype=weight_dtype(precision, trains_all),
        compilation=compilation,
        devices=devices,
        nodes=nodes,
        trains_all=trains_all,
        max_seconds=max_seconds(config.trainer),
        starts_ranks=starts_ranks,
        is_rank=machine.is_here and is_several and not starts_ranks,
    )


def check_strategy(config: TrainConfig, precision: str) -> None:
    """Raise ValueError for what several processes cannot do."""
    if config.strategy.kind is not StrategyKind.fsdp:
        return
    if precision == "16-mixed":
        raise ValueError("trainer.precision=16-mixed strategy=fsdp: use bf16-true, bf16-mixed or 32-true")
    if reason := METHODS[config.adapter.method].cannot_shard:
        raise ValueError(f"method={config.adapter.method} strategy=fsdp: {reason}; use strategy=ddp")
    if tied := config.adapter.tied:
        raise ValueError(
            f"method={config.adapter.method} strategy=fsdp: all layers have one {' and '.join(tied)}, and each block "
            "is sharded by itself; use strategy=ddp"
        )


def check_ranks_can_start(plan: RunPlan) -> None:
    """Raise ValueError where this process would have to start ranks on other nodes."""
    if plan.starts_ranks and plan.nodes > 1:
        raise ValueError(
            f"trainer.num_nodes={plan.nodes}: ranks on other nodes are started by srun or torchrun, as in "
            "srun python -m lightning_peft train config_path=RUN/config.yaml"
        )


@contextmanager
def logging_left_to_ranks(left: bool) -> Iterator[None]:
    """Log nothing below an error, inside the block: the ranks check the same again, and rank zero says it."""
    package = logging.getLogger("lightning_peft")
    level = package.level
    package.setLevel(logging.ERROR if left else level)
    try:
        yield
    finally:
        package.setLevel(level)
