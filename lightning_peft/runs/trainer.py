"""Lightning's Trainer from the `trainer.*` options, with the parts that `train` decides itself."""

import logging
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger

from lightning_peft import distributed
from lightning_peft.checkpoint.resume import AtomicCheckpointIO
from lightning_peft.config import TrainConfig
from lightning_peft.data.datamodule import SFTDataModule
from lightning_peft.runs.nodes import made, reason
from lightning_peft.runs.plan import RunPlan
from lightning_peft.tracking.loggers import RunLogger, failing_alone
from lightning_peft.training.callbacks.step_validation import NEVER, StepValidation
from lightning_peft.training.callbacks.training_progress import TrainingProgress
from lightning_peft.training.config import StrategyKind
from lightning_peft.training.precision import precision_plugin
from lightning_peft.training.strategies import build_strategy

logger = logging.getLogger(__name__)


def count_steps(options: dict[str, Any], data: SFTDataModule) -> int:
    """Return the run's optimiser steps: `max_steps`, or `max_epochs` (1) passes over the rows, whichever ends first."""
    max_steps, max_epochs = options.get("max_steps"), options.get("max_epochs")
    if max_steps in (None, -1):
        return data.steps_per_epoch * (1 if max_epochs in (None, -1) else max_epochs)
    if max_epochs in (None, -1) or data.is_streaming:
        return max_steps
    by_epochs = data.steps_per_epoch * max_epochs
    if by_epochs < max_steps:
        logger.info("trainer.max_epochs=%d ends the run at step %d of trainer.max_steps", max_epochs, by_epochs)
    return min(max_steps, by_epochs)


def quiet_lightning() -> None:
    """Log nothing below a warning from Lightning, and that once: its import sets its own level and handlers."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True


def build_trainer(config: TrainConfig, plan: RunPlan, steps: int, callbacks: list[Callback]) -> Trainer:
    """Return the Trainer of a run of so many optimiser steps. Raises ValueError for options Lightning refuses."""
    quiet_lightning()
    # Its time limit would end the run for good: `training/preemption.py` pauses it.
    options = {key: value for key, value in config.trainer.items() if key not in ("precision", "max_time")}
    accelerator = plan.accelerator
    # The end is a number of steps in any case: Lightning resumes a run that ends by epochs differently.
    options |= {"max_steps": steps, "max_epochs": -1, "accelerator": "gpu" if accelerator == "cuda" else "cpu"}
    options |= {"devices": plan.devices, "num_nodes": plan.nodes}
    if config.strategy.kind is StrategyKind.fsdp:
        options["inference_mode"] = False  # a tensor gathered for a validation is gathered into again for training
    if config.validation.every_n_steps is not None or config.validation.at_steps:
        options |= {"val_check_interval": NEVER, "check_val_every_n_epoch": None}
        step_validation = StepValidation(config.validation.every_n_steps, config.validation.at_steps)
        callbacks = [step_validation, *callbacks]  # the others ask what it decided
    else:
        options["limit_val_batches"] = 0
    own = made("callbacks", config.callbacks, Callback)
    loggers = [
        logger if isinstance(logger, RunLogger) else failing_alone(logger, f"logger.{name}")
        for name, logger in zip(config.logger, made("logger", config.logger, Logger), strict=True)
    ]
    progress: list[Callback] = [] if options.get("enable_progress_bar") is False else [TrainingProgress()]
    try:
        return instantiate(
            options,
            _convert_="all",
            callbacks=[*callbacks, *own, *progress],
            logger=loggers,
            strategy=build_strategy(config.strategy, accelerator, plan.ranks),
            plugins=[
                precision_plugin(plan.precision, accelerator),
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
