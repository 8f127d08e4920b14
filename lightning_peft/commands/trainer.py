"""Lightning's Trainer from the `trainer.*` options, with the parts that `train` decides itself."""

import difflib
import inspect
import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import Logger
from rich.console import Console

from lightning_peft import distributed
from lightning_peft.checkpoint.resume import AtomicCheckpointIO
from lightning_peft.config import TrainConfig
from lightning_peft.data.datamodule import SFTDataModule
from lightning_peft.training.callbacks.progress import PlainProgress
from lightning_peft.training.callbacks.step_validation import NEVER, StepValidation
from lightning_peft.training.config import StrategyKind
from lightning_peft.training.precision import precision_plugin
from lightning_peft.training.strategies import build_strategy

logger = logging.getLogger(__name__)

OWNED = {
    "strategy": "strategy=single, ddp or fsdp",
    "callbacks": "callbacks.NAME._target_",
    "logger": "logger=csv, wandb, tensorboard or none",
    "plugins": "trainer.precision",
    "val_check_interval": "validation.every_n_steps",
    "check_val_every_n_epoch": "validation.every_n_steps",
    "limit_val_batches": "data.max_validation_rows",
    "enable_checkpointing": "checkpoint.every_n_steps",
    "default_root_dir": "run_dir",
    **dict.fromkeys(("use_distributed_sampler", "enable_model_summary", "num_sanity_val_steps"), "no option"),
}
"""Trainer arguments that `train` sets, and what to use instead."""

AT_LEAST_ONE = ("accumulate_grad_batches", "log_every_n_steps")


def check_trainer_options(options: dict[str, Any]) -> None:
    """Raises ValueError for an argument the Trainer lacks, one `train` sets itself, or a value that cannot be."""
    known = set(inspect.signature(Trainer).parameters)
    for key in options:
        if key != "_target_" and key not in known:
            matches = difflib.get_close_matches(key, known - OWNED.keys(), n=3)
            hint = f"; did you mean trainer.{', trainer.'.join(matches)}?" if matches else ""
            raise ValueError(f"trainer.{key}: lightning.pytorch.Trainer has no such argument{hint}")
        if key in OWNED:
            raise ValueError(f"trainer.{key}: set by train itself; use {OWNED[key]}")
    for key in ("max_steps", "max_epochs", *AT_LEAST_ONE):
        value = options.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise ValueError(f"trainer.{key}={value}: must be a whole number")
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


def quiet_lightning() -> None:
    """Nothing below a warning from Lightning, and that once: its import sets its own level and handlers."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True


def check_nodes(config: TrainConfig) -> None:
    """Raises ValueError for a callback or logger whose `_target_` is missing, is none, or takes other arguments.

    Only its module is imported.
    """
    for group, nodes, kind in (("callbacks", config.callbacks, Callback), ("logger", config.logger, Logger)):
        for name, node in nodes.items():
            key = f"{group}.{name}"
            if not isinstance(node, Mapping) or "_target_" not in node:
                raise ValueError(f"{key}: has no {key}._target_, the Lightning {kind.__name__.lower()} to be made")
            try:
                target = get_object(node["_target_"])
                arguments = {str(k): value for k, value in node.items() if not re.fullmatch("_[a-z]+_", str(k))}
                if "_args_" not in node:
                    inspect.signature(target).bind(**arguments)
            except (ImportError, ValueError, TypeError) as error:
                raise ValueError(f"{key}._target_={node['_target_']}: {reason(error)}") from error
            if isinstance(target, type) and not issubclass(target, kind):
                raise ValueError(f"{key}._target_={node['_target_']}: no Lightning {kind.__name__.lower()}")


def made(group: str, nodes: Mapping[str, Any], kind: type) -> list[Any]:
    """The callbacks or loggers that the nodes describe. Raises ValueError for one that cannot be made."""
    parts = []
    for name, node in nodes.items():
        try:
            parts.append(instantiate(node))
        except InstantiationException as error:
            raise ValueError(f"{group}.{name}: {reason(error)}") from error
        if not isinstance(parts[-1], kind):
            raise ValueError(f"{group}.{name}: {node['_target_']} gives no Lightning {kind.__name__.lower()}")
    return parts


def reason(error: BaseException) -> str:
    """What a library said first, without Hydra's words around it."""
    while isinstance(error, InstantiationException | ImportError) and error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def resolve_accelerator(name: str) -> str:
    """cpu or cuda, from `trainer.accelerator`."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda", "gpu"):
        raise ValueError(f"trainer.accelerator={name!r}: must be auto, cpu or gpu")
    if name != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"trainer.accelerator={name}: this machine has no CUDA device; use cpu or auto")
    return "cpu" if name == "cpu" else "cuda"


def count_ranks(options: dict[str, Any], strategy: StrategyKind, accelerator: str) -> tuple[int, int]:
    """(ranks on a node, nodes). Raises ValueError where the options, or the ranks that were started, do not agree."""
    devices, nodes = options.get("devices", 1), options.get("num_nodes", 1)
    if devices in ("auto", -1):
        devices = torch.cuda.device_count() if accelerator == "cuda" and strategy is not StrategyKind.single else 1
    for key, value in (("devices", devices), ("num_nodes", nodes)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            hint = " or auto; CUDA_VISIBLE_DEVICES picks which" if key == "devices" else ""
            raise ValueError(f"trainer.{key}={value}: must be a whole number of at least 1{hint}")
        if value > 1 and strategy is StrategyKind.single:
            raise ValueError(f"trainer.{key}={value} strategy=single: one process; use strategy=ddp or strategy=fsdp")
    if accelerator == "cuda" and devices > torch.cuda.device_count():
        raise ValueError(f"trainer.devices={devices}: this machine has {torch.cuda.device_count()} CUDA devices")
    if distributed.are_ranks_started() and distributed.world_size() != devices * nodes:
        raise ValueError(
            f"trainer.devices={devices} trainer.num_nodes={nodes}: {devices * nodes} ranks, but "
            f"{distributed.world_size()} were started (by torchrun or srun)"
        )
    if (tasks := distributed.slurm_tasks_per_node()) not in (None, devices):
        raise ValueError(
            f"trainer.devices={devices} trainer.num_nodes={nodes}: srun started {tasks} tasks on a node; set "
            f"trainer.devices={tasks} trainer.num_nodes={distributed.world_size() // tasks}"
        )
    return devices, nodes


def count_steps(options: dict[str, Any], data: SFTDataModule) -> int:
    """Optimiser steps of the run: `max_steps`, or `max_epochs` (1) passes over the rows, whichever ends first."""
    max_steps, max_epochs = options.get("max_steps"), options.get("max_epochs")
    if max_steps in (None, -1):
        return data.steps_per_epoch * (1 if max_epochs in (None, -1) else max_epochs)
    if max_epochs in (None, -1) or data.is_streaming:
        return max_steps
    by_epochs = data.steps_per_epoch * max_epochs
    if by_epochs < max_steps:
        logger.info("trainer.max_epochs=%d ends the run at step %d of trainer.max_steps", max_epochs, by_epochs)
    return min(max_steps, by_epochs)


def build_trainer(
    config: TrainConfig, steps: int, accelerator: str, precision: str, callbacks: list[Callback]
) -> Trainer:
    """The Trainer of a run of so many optimiser steps. Raises ValueError for options Lightning refuses."""
    quiet_lightning()
    options = {key: value for key, value in config.trainer.items() if key != "precision"}
    # The end is a number of steps in any case: Lightning resumes a run that ends by epochs differently.
    options |= {"max_steps": steps, "max_epochs": -1, "accelerator": "gpu" if accelerator == "cuda" else "cpu"}
    devices, nodes = count_ranks(config.trainer, config.strategy.kind, accelerator)
    options |= {"devices": devices, "num_nodes": nodes}
    if config.strategy.kind is StrategyKind.fsdp:
        options["inference_mode"] = False  # what is gathered for a validation is gathered into again for training
    if config.validation.every_n_steps is not None:
        options |= {"val_check_interval": NEVER, "check_val_every_n_epoch": None}
        callbacks = [StepValidation(config.validation.every_n_steps), *callbacks]  # the others ask what it decided
    else:
        options["limit_val_batches"] = 0
    own = made("callbacks", config.callbacks, Callback)
    loggers = made("logger", config.logger, Logger)
    progress = RichProgressBar(leave=True) if Console().is_terminal else PlainProgress()
    try:
        return instantiate(
            options,
            _convert_="all",
            callbacks=[*callbacks, *own, progress],
            logger=loggers,
            strategy=build_strategy(config.strategy, accelerator, devices * nodes),
            plugins=[
                precision_plugin(precision, accelerator),
                AtomicCheckpointIO(config.checkpoint.keep_last, config.checkpoint.asynchronous),
                distributed.rank_environment(),
            ],
            # Under SLURM Lightning loads any hpc_ckpt file it finds there, unasked.
            default_root_dir=f"{config.run_dir}/checkpoints",
            enable_checkpointing=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
        )
    except InstantiationException as error:
        raise ValueError(f"trainer: {reason(error)}") from error
