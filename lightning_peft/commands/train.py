"""`lightning-peft train`: from a resolved config to an adapter, its metrics and its lineage in one run folder."""

import json
import logging
import time
from dataclasses import replace
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerFast

from lightning_peft import distributed
from lightning_peft.adapters.ends import untie_where_asked
from lightning_peft.adapters.inject import describe_targets, inject_adapters
from lightning_peft.adapters.on_published import check_fits_published
from lightning_peft.adapters.registry import METHODS
from lightning_peft.adapters.targets import find_targets
from lightning_peft.checkpoint.lineage import check_lineage
from lightning_peft.checkpoint.peft_format import adapter_sha256
from lightning_peft.checkpoint.peft_words import gives_rewards
from lightning_peft.commands.step_estimate import with_fitting_checkpointing
from lightning_peft.commands.training import Prepared, prepare_folder, train_with_rollbacks
from lightning_peft.config import TrainConfig
from lightning_peft.data.audit import preview
from lightning_peft.data.datamodule import SFTDataModule
from lightning_peft.data.samples import read_conversations
from lightning_peft.evaluation.scorers import scorers_of
from lightning_peft.inference.load import adapter_folder
from lightning_peft.models.blocks import check_blocks_can_be_sharded
from lightning_peft.models.loading import (
    empty_model,
    load_tokenizer,
    model_context,
    model_name,
    model_vocabulary,
    prepare_as_published,
)
from lightning_peft.models.packing_choice import packing_of
from lightning_peft.models.stored import source_fingerprint
from lightning_peft.objectives.registry import OBJECTIVES
from lightning_peft.objectives.reward import refuse_trained_output
from lightning_peft.objectives.teacher import TaughtConfig
from lightning_peft.runs.command import kept_commands
from lightning_peft.runs.folder import RunStart, check_same_content, folder_of, opened_folder
from lightning_peft.runs.machine import Machine
from lightning_peft.runs.plan import RunPlan, check_ranks_can_start, logging_left_to_ranks, plan_run
from lightning_peft.runs.ranks import leave_with_launcher, run_ranks
from lightning_peft.threads import described
from lightning_peft.training.callbacks.task_metrics import Questions, TaskMetrics
from lightning_peft.training.config import ActivationCheckpointing, StrategyKind
from lightning_peft.training.teacher import check_teacher, content_of_teacher, teacher_context, teacher_packs
from lightning_peft.training.together import Member

logger = logging.getLogger(__name__)


def train(config: TrainConfig, member: Member | None = None) -> dict[str, Any]:
    """Run a training to its end, or on from its last checkpoint; return what `result.json` holds.

    With `member` the run is one of several that share this process and a base (`commands/together.py`), and its
    ranks exist.

    Raises ValueError, before a weight is read, for anything wrong with the config, the data or the run folder; the
    reasons of `training/preemption.py` where the run is left before its end, with `result.json` written.
    With strategy=ddp or fsdp the ranks are started from here, once everything is checked, unless this process is one.
    """
    started = time.perf_counter()
    if config.cluster is not None:
        raise ValueError("cluster: train runs here; submit takes the same words and hands them to the cluster")
    # What is only looked at is for the machine it names, as on a laptop before a cluster is asked.
    plan = plan_run(config, Machine.planned(config.trainer) if config.dry_run else Machine.here(config.trainer))
    if not plan.machine.is_here:
        logger.info("this machine has no CUDA device: the run is checked for one that has")
    check_ranks_can_start(plan)
    if plan.is_rank and member is None:
        leave_with_launcher()
    leaves_ranks = plan.is_rank and member is None and distributed.connect(plan.accelerator)
    if config.activation_checkpointing is ActivationCheckpointing.auto:
        given = config
        config = distributed.on_rank_zero(lambda: with_fitting_checkpointing(given, plan.machine))
    run_dir = folder_of(config)
    with opened_folder(config) as start:
        if start.result is not None and not config.dry_run:
            return finished_before(config, plan, start, start.result)
        if plan.accelerator == "cpu" and not plan.starts_ranks and not config.dry_run:
            logger.info("%s", described())
        with logging_left_to_ranks(plan.starts_ranks and not config.dry_run):
            packs = check_model(config)
        tokenizer = load_tokenizer(config.model)
        if isinstance(config.objective, TaughtConfig):
            length = config.data.max_length
            check_teacher(config.objective, config.model, config.quantization, tokenizer, length)
        data = read_data(config, packs, tokenizer, plan)
        scored = task_metrics(config, data, tokenizer)
        if config.dry_run:
            return {"status": "dry run"}
        content = content_of(config, data)
        distributed.on_rank_zero(lambda: check_same_content(start, run_dir, content))
        if plan.starts_ranks:
            prepare_folder(config, run_dir)
            kept_commands(run_dir)
            run_ranks(run_dir / "config.yaml", plan.devices)
            return json.loads((run_dir / "result.json").read_text())
        run = Prepared(config, plan, data, tokenizer, scored, content, started, leaves_ranks, member)
        return train_with_rollbacks(run, start.checkpoint)


def finished_before(config: TrainConfig, plan: RunPlan, start: RunStart, result: dict[str, Any]) -> dict[str, Any]:
    """Return the result of a run that is finished. Raises ValueError for a run whose rows or base changed."""
    run_dir = folder_of(config)
    try:
        with logging_left_to_ranks(True):
            content = content_of(config, read_data(config, check_model(config), load_tokenizer(config.model), plan))
    except (ValueError, OSError) as error:
        logger.warning("%s: its rows and base cannot be compared with those it was trained on: %s", run_dir, error)
    else:
        distributed.on_rank_zero(lambda: check_same_content(start, run_dir, content))
    logger.info("%s is finished: nothing left to do", run_dir)
    return result


def content_of(config: TrainConfig, data: SFTDataModule) -> dict[str, str]:
    """Return name and fingerprint of what decides a run beside its options."""
    content = {"training rows": data.fingerprint, "base weights": source_fingerprint(config.model)}
    if data.validation_fingerprint is not None:
        content["validation rows"] = data.validation_fingerprint
    if isinstance(config.objective, TaughtConfig):
        content |= content_of_teacher(config.objective)
    if config.adapter.init_from is not None:  # it is the reference of a preference objective, and read again on resume
        folder = adapter_folder(config.adapter.init_from, "adapter.init_from")
        content["files of adapter.init_from"] = adapter_sha256(folder)
    return content


def read_data(config: TrainConfig, packs: bool, tokenizer: PreTrainedTokenizerFast, plan: RunPlan) -> SFTDataModule:
    """Read and check the rows, and show one where `data.preview` asks for it."""
    rows = replace(config.data, packing=packs)
    accumulate = config.trainer.get("accumulate_grad_batches", 1)
    context, vocabulary = model_context(config.model), model_vocabulary(config.model, tokenizer)
    of_teacher = teacher_context(config.objective, config.model)
    data = SFTDataModule(rows, tokenizer, config.seed, context, accumulate, vocabulary, of_teacher)
    is_shown_by_ranks = plan.starts_ranks and not config.dry_run
    with logging_left_to_ranks(is_shown_by_ranks):
        data.setup()
    if config.data.preview and data.example is not None and distributed.rank() == 0 and not is_shown_by_ranks:
        console = Console()
        console.print(preview(data.example, tokenizer, has_colours=console.color_system is not None))
    return data


def check_model(config: TrainConfig) -> bool:
    """Find the target layers on an empty model, so that a wrong pattern costs no loading; print them on a dry run.

    Return whether samples are packed.
    """
    if config.adapter.init_from is not None:
        folder = adapter_folder(config.adapter.init_from, "adapter.init_from")
        if gives_rewards(folder) and not OBJECTIVES[config.objective.name].gives_rewards:
            raise ValueError(f"adapter.init_from={folder}: is a reward model's; objective=reward trains it on")
        check_lineage(folder, source_fingerprint(config.model), config.quantization.kind.name, model_name(config.model))
    model = empty_model(config.model)
    if (prepare := OBJECTIVES[config.objective.name].prepare) is not None:
        prepare(model, config.seed)
    if (form := prepare_as_published(model, config.model)) is not None:
        check_fits_published(form, config.adapter, config.quantization)
    if config.strategy.kind is StrategyKind.fsdp:
        check_blocks_can_be_sharded(model)
    method = METHODS[config.adapter.method]
    untie_where_asked(model, config.adapter)
    targets = find_targets(model, config.adapter, tuple(method.layers)) if method.layers else []
    packs = packing_of(config.data, model)
    if isinstance(config.objective, TaughtConfig) and config.objective.runs_teacher:
        packs = packs and teacher_packs(config.objective, config.data)
    if config.dry_run or OBJECTIVES[config.objective.name].gives_rewards:
        inject_adapters(model, config.adapter)
    if OBJECTIVES[config.objective.name].gives_rewards:
        refuse_trained_output(model)
    if config.dry_run:
        Console().print(describe_targets(targets, model))
    return packs


def task_metrics(config: TrainConfig, data: SFTDataModule, tokenizer: PreTrainedTokenizerFast) -> TaskMetrics | None:
    """Prepare `validation.metrics`; None where there are none. Raises ValueError for what these rows cannot give."""
    if not config.validation.metrics:
        return None
    found = read_conversations(config.data, "validation", tokenizer=tokenizer)
    columns = sorted({"prompt", "completion"}.union(*(row for row, _ in found)))
    scorers = scorers_of(config.validation.metrics, config.data.task, columns)
    context, most = model_context(config.model), config.validation.max_new_tokens
    answer = most or max(scorer.max_new_tokens for scorer in scorers)
    longest = None if context is None else context - answer
    questions = Questions.of(found, tokenizer, data.prompt_layout, config.validation.metric_rows, longest)
    return TaskMetrics(config.validation, scorers, questions, tokenizer)
