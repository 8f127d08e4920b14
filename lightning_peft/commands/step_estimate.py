"""The estimate of a run's step from its config alone, and the checkpointing that it lets `auto` choose."""

import logging
from contextlib import nullcontext
from dataclasses import fields, replace
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from lightning_peft.adapters.inject import inject_adapters
from lightning_peft.adapters.on_published import check_fits_published
from lightning_peft.adapters.registry import METHODS
from lightning_peft.checkpoint.peft_format import adapter_config_from_peft
from lightning_peft.command_configs.of_runs import EstimateConfig
from lightning_peft.config import TrainConfig
from lightning_peft.estimation.memory import Estimate, StepOptions, estimate_step
from lightning_peft.estimation.teacher import give_empty_teacher, stored_by_teacher
from lightning_peft.models.attention import accept_packed_batches
from lightning_peft.models.loading import empty_model, prepare_as_published
from lightning_peft.models.weight_streaming import fp32_pattern
from lightning_peft.objectives.model_loss import ModelLoss
from lightning_peft.objectives.registry import OBJECTIVES
from lightning_peft.objectives.sft import SupervisedLoss
from lightning_peft.objectives.teacher import TaughtConfig, TaughtLoss
from lightning_peft.quantization.quantize import prepare_quantized
from lightning_peft.runs.machine import GIB, Machine
from lightning_peft.runs.plan import RunPlan, logging_left_to_ranks, plan_run
from lightning_peft.training.activation_checkpointing import checkpoint_blocks
from lightning_peft.training.adapter_start import reads_whole_model
from lightning_peft.training.config import ActivationCheckpointing
from lightning_peft.training.precision import DTYPES
from lightning_peft.training.teacher import named_as_teacher, shares_base, teacher_folder, teacher_model

logger = logging.getLogger(__name__)

Config = TypeVar("Config", bound=TrainConfig)

CHEAPEST_FIRST = (
    ActivationCheckpointing.none,
    ActivationCheckpointing.elementwise,
    ActivationCheckpointing.selective,
    ActivationCheckpointing.blocks,
)
"""Modes in the order of the work done twice."""
OF_THE_STEP = ("accelerator", "devices", "num_nodes", "precision", "accumulate_grad_batches")
"""Options of the trainer on which the memory of a step depends."""
ROOM = {"cpu": 1.0, "cuda": 0.95}
"""Share of the usable memory that an estimate may take, which knows nothing of what an allocator leaves unused."""


def plan_of(config: EstimateConfig) -> RunPlan:
    return plan_run(config, Machine.planned(config.trainer))


def estimate_of(config: EstimateConfig, together: int = 1) -> Estimate:
    """Return the estimate of one run; with the mode that fits where activation_checkpointing=auto.

    With `together` it is of one process in which so many runs like this one train on one base.
    """
    plan = plan_of(config)
    config = with_fitting_checkpointing(config, plan.machine)
    accelerator = plan.accelerator
    if config.model.attention == "flex_attention":  # which has no gradient where a step is only looked at
        logger.info("model.attention=flex_attention: estimated with sdpa")
        config = replace(config, model=replace(config.model, attention="sdpa"))
    options = StepOptions(
        rows=config.data.micro_batch_size * OBJECTIVES[config.objective.name].rows.samples,
        length=config.data.max_length,
        optimizer=config.optimizer.name,
        accumulate=config.trainer.get("accumulate_grad_batches", 1),
        autocast=DTYPES[plan.precision] if plan.precision.endswith("-mixed") else None,
        offloads_activations=config.activation_checkpointing is ActivationCheckpointing.offload,
        accelerator=accelerator,
        strategy=config.strategy.kind.name,
        ranks=plan.ranks,
        slices_on_host=config.strategy.cpu_offload and accelerator == "cuda",
        # For a GPU such a model is read by the host, and reaches the device block by block.
        loads_whole=accelerator == "cpu" and reads_whole_model(config.adapter, config.quantization),
        adapter_rank=config.adapter.rank,
        together=together,
    )
    objective: ModelLoss = empty_objective(config, plan.weight_dtype)
    if isinstance(config.objective, TaughtConfig) and config.objective.runs_teacher:
        teacher = empty_teacher(config, config.objective, plan.weight_dtype)
        stored = stored_by_teacher(teacher, objective.model, shares_base(config.objective))
        options = replace(options, teacher=stored)
        objective = OBJECTIVES[config.objective.name].build(objective.model, config.objective, "auto")
        assert isinstance(objective, TaughtLoss), "the loss of options with a teacher"
        give_empty_teacher(objective, teacher)
    return estimate_step(objective, options)


def memory_key(config: TrainConfig) -> str:
    """Return a text that runs of one estimate have in common, whatever their rows, learning rates and seeds are.

    An option that `estimate_of` does not read may be in it: then two runs are estimated where one would do.
    """
    adapter = replace(config.adapter, alpha=None, alpha_pattern={})
    data = config.data.micro_batch_size, config.data.max_length, config.data.packing
    trainer = {key: config.trainer.get(key) for key in OF_THE_STEP}
    device = config.activation_checkpointing, config.device_memory_gib, config.compile
    parts = (config.model, adapter, config.quantization, config.objective, config.optimizer.name, config.strategy)
    return repr((*parts, data, trainer, device))


def empty_teacher(config: TrainConfig, objective: TaughtConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return the teacher as `train` loads it, on the meta device."""
    named, folder = teacher_model(objective), teacher_folder(objective)
    source = named or config.model
    with named_as_teacher() if named is not None else nullcontext():
        teacher = empty_model(source, dtype)
    is_quantized = config.quantization.is_on and (named is None or objective.quantize_teacher)
    if prepare_as_published(teacher, source) is None and is_quantized:
        prepare_quantized(teacher, config.quantization)
    if folder is not None:
        inject_adapters(teacher, adapter_config_from_peft(folder))
    return teacher


def empty_objective(config: TrainConfig, dtype: torch.dtype) -> ModelLoss:
    """Return model and loss as `train` makes them, on the meta device."""
    model = empty_model(config.model, dtype)
    form = prepare_as_published(model, config.model)
    if form is not None:
        check_fits_published(form, config.adapter, config.quantization)
    elif (
        not config.model.random_weights
        and hasattr(model.config, "quantization_config")
        and not config.quantization.is_on
    ):
        raise ValueError(
            "quantization.kind=none: the checkpoint holds 4-bit codes; estimate it with quantization=nf4 or fp4"
        )
    if (kept := fp32_pattern(model, dtype)) is not None:
        for name, parameter in model.named_parameters():
            if kept.search(name):
                parameter.data = parameter.data.float()
    adapter, quantization = config.adapter, config.quantization
    if (largest := METHODS[adapter.method].largest_selection) is not None:
        selection = largest(model, adapter)
        logger.info("taken for trained in full, the most that adapter.budget holds: %s", ", ".join(selection.chosen))
        adapter = selection.applied(adapter)
        quantization = replace(quantization, exclude=[*quantization.exclude, *selection.chosen])
    if quantization.is_on:
        prepare_quantized(model, quantization)
    accept_packed_batches(model)
    row = OBJECTIVES[config.objective.name]
    if row.prepare is not None:
        row.prepare(model, config.seed)
    inject_adapters(model, adapter)
    checkpoint_blocks(model, config.activation_checkpointing)
    return row.build(model, config.objective, config.data.packing) if row.gives_rewards else SupervisedLoss(model)


def with_fitting_checkpointing(config: Config, machine: Machine) -> Config:
    """Return the config with a mode in place of auto: the first of `CHEAPEST_FIRST` whose estimated peak fits.

    Where no memory is known the default is taken, and where none fits the last; a line says which and why.
    """
    if config.activation_checkpointing is not ActivationCheckpointing.auto:
        return config
    limit = machine.memory(config.device_memory_gib)
    if limit is None:
        logger.info("activation_checkpointing=auto: elementwise, as no memory of the device is known here")
        return replace(config, activation_checkpointing=ActivationCheckpointing.elementwise)
    limit *= ROOM[machine.accelerator]
    options = {field.name: getattr(config, field.name) for field in fields(TrainConfig)}
    for mode in CHEAPEST_FIRST:
        with logging_left_to_ranks(True):  # the run says it all again
            peak = estimate_of(EstimateConfig(**options | {"activation_checkpointing": mode, "cluster": None})).peak
        if peak <= limit:
            logger.info(
                "activation_checkpointing=auto: %s, estimated at %.2f of %.2f GiB", mode.name, peak / GIB, limit / GIB
            )
            return replace(config, activation_checkpointing=mode)
    logger.warning(
        "activation_checkpointing=auto: blocks, which is estimated at %.2f of %.2f GiB; `estimate` with the same words "
        "says what would fit", peak / GIB, limit / GIB,
    )  # fmt: skip
    return replace(config, activation_checkpointing=CHEAPEST_FIRST[-1])
