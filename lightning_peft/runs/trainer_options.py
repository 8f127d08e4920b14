"""The `trainer.*` options: which there are, what they may be, and how many ranks they ask for."""

import difflib
import inspect
from datetime import timedelta
from typing import Any

from lightning.pytorch import Trainer

from lightning_peft import distributed
from lightning_peft.other_tools import ours
from lightning_peft.runs.machine import Machine
from lightning_peft.training.config import StrategyKind
from lightning_peft.written_numbers import number_meant

OWNED = {
    "strategy": "strategy=single, ddp or fsdp",
    "callbacks": "callbacks.NAME._target_",
    "logger": "logger=csv, wandb, mlflow, trackio, comet, tensorboard or none",
    "plugins": "trainer.precision",
    "val_check_interval": "validation.every_n_steps",
    "check_val_every_n_epoch": "validation.every_n_steps",
    "limit_train_batches": "trainer.max_steps for a shorter run, data.max_rows for fewer rows",
    "overfit_batches": "data.max_rows for few rows, with trainer.max_steps for many passes over them",
    "limit_val_batches": "data.max_validation_rows",
    "enable_checkpointing": "checkpoint.every_n_steps",
    "default_root_dir": "run_dir",
    **dict.fromkeys(("use_distributed_sampler", "enable_model_summary", "num_sanity_val_steps"), "no option"),
}
"""Trainer arguments that `train` sets, and what to use instead."""

AT_LEAST_ONE = ("accumulate_grad_batches", "log_every_n_steps")


def check_trainer_options(options: dict[str, Any]) -> None:
    """Raise ValueError for an argument the Trainer lacks, one `train` sets itself, or a value that cannot be."""
    known = set(inspect.signature(Trainer).parameters)
    for key in options:
        if key != "_target_" and key not in known:
            matches = difflib.get_close_matches(key, known - OWNED.keys(), n=3)
            hint = f"; did you mean trainer.{', trainer.'.join(matches)}?" if matches else ""
            if (meant := ours(key)) is not None and meant != f"trainer.{key}":
                hint = f"; use {meant}"
            raise ValueError(f"trainer.{key}: lightning.pytorch.Trainer has no such argument{hint}")
        if key in OWNED:
            raise ValueError(f"trainer.{key}: set by train itself; use {OWNED[key]}")
    for key in ("max_steps", "max_epochs", *AT_LEAST_ONE):
        value = options.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            number = number_meant(str(value), key, is_whole=True)
            right = f"; write {number}, without quotes" if number is not None else ""
            raise ValueError(f"trainer.{key}={value}: must be a whole number{right}")
    for key in ("max_steps", "max_epochs"):
        value = options.get(key)
        if value not in (None, -1) and value < 1:
            raise ValueError(f"trainer.{key}={value}: must be at least 1, or -1 for no limit")
    for key in AT_LEAST_ONE:
        if options.get(key, 1) < 1:
            raise ValueError(f"trainer.{key}={options[key]}: must be at least 1")
    clip = options.get("gradient_clip_val")
    if clip is not None and not (isinstance(clip, int | float) and clip >= 0):
        raise ValueError(f"trainer.gradient_clip_val={clip}: must be at least 0; 0 or null does not clip")
    if (algorithm := options.get("gradient_clip_algorithm", "norm")) not in (None, "norm"):
        raise ValueError(f"trainer.gradient_clip_algorithm={algorithm!r}: only norm is supported")


def count_ranks(options: dict[str, Any], strategy: StrategyKind, machine: Machine) -> tuple[int, int]:
    """Return (ranks on a node, nodes). Raises ValueError where the options, or the ranks started, do not agree."""
    devices, nodes = options.get("devices", 1), options.get("num_nodes", 1)
    if devices in ("auto", -1):
        devices = max(1, machine.gpus or 0) if strategy is not StrategyKind.single else 1
    for key, value in (("devices", devices), ("num_nodes", nodes)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            hint = " or auto; CUDA_VISIBLE_DEVICES picks which" if key == "devices" else ""
            raise ValueError(f"trainer.{key}={value}: must be a whole number of at least 1{hint}")
        if value > 1 and strategy is StrategyKind.single:
            raise ValueError(f"trainer.{key}={value} strategy=single: one process; use strategy=ddp or strategy=fsdp")
    if machine.is_here and machine.gpus and devices > machine.gpus:
        raise ValueError(f"trainer.devices={devices}: this machine has {machine.gpus} CUDA devices")
    if machine.is_here and distributed.are_ranks_started() and distributed.world_size() != devices * nodes:
        raise ValueError(
            f"trainer.devices={devices} trainer.num_nodes={nodes}: {devices * nodes} ranks, but "
            f"{distributed.world_size()} were started (by torchrun or srun)"
        )
    if machine.is_here and (tasks := distributed.slurm_tasks_per_node()) not in (None, devices):
        raise ValueError(
            f"trainer.devices={devices} trainer.num_nodes={nodes}: srun started {tasks} tasks on a node; set "
            f"trainer.devices={tasks} trainer.num_nodes={distributed.world_size() // tasks}"
        )
    return devices, nodes


def max_seconds(options: dict[str, Any]) -> float | None:
    """Return `trainer.max_time` in seconds, from DD:HH:MM:SS or HH:MM:SS, or timedelta's words as in {hours: 2}."""
    value = options.get("max_time")
    if value is None:
        return None
    wrong = ValueError(
        f"trainer.max_time={value}: must be DD:HH:MM:SS or HH:MM:SS, as in 00:12:00:00, in quotes in a file"
    )
    if isinstance(value, dict):
        try:
            seconds = timedelta(**value).total_seconds()
        except TypeError as error:
            raise wrong from error
    else:
        parts = str(value).split(":")
        if len(parts) not in (3, 4) or not all(part.isdecimal() for part in parts):
            raise wrong
        seconds = sum(int(part) * unit for part, unit in zip(reversed(parts), (1, 60, 3600, 86400), strict=False))
    if seconds <= 0:
        raise wrong
    return seconds
