"""`lightning-peft train`: from a resolved config to an adapter, its metrics and its lineage in one run folder."""

import gc
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lightning_peft import distributed, readable
from lightning_peft.adapters.base import Adapter
from lightning_peft.adapters.hybrid_lora import table_of
from lightning_peft.adapters.inject import adapters, describe_targets, inject_adapters, trainable_parameter_counts
from lightning_peft.adapters.method import Selection
from lightning_peft.adapters.on_published import check_fits_published
from lightning_peft.adapters.registry import METHODS
from lightning_peft.adapters.targets import find_targets
from lightning_peft.checkpoint.atomic import atomic_file, atomic_folder
from lightning_peft.checkpoint.lineage import Lineage, check_lineage, installed_versions, write_lineage
from lightning_peft.checkpoint.merged import merged_state, save_model
from lightning_peft.checkpoint.model_card import write_card
from lightning_peft.checkpoint.peft_check import objection_of_peft
from lightning_peft.checkpoint.peft_format import save_adapter
from lightning_peft.checkpoint.peft_methods import spelling
from lightning_peft.checkpoint.resume import saved_selection, whole_state
from lightning_peft.config import TrainConfig, plain
from lightning_peft.data.audit import Audit, preview
from lightning_peft.data.datamodule import SFTDataModule
from lightning_peft.data.layout import PromptLayout
from lightning_peft.data.samples import read_conversations
from lightning_peft.evaluation.scorers import scorers_of
from lightning_peft.inference.generate import declared_end_ids
from lightning_peft.inference.load import MODEL_FOLDER, adapter_folder
from lightning_peft.models.loading import (
    empty_model,
    load_tokenizer,
    model_context,
    model_name,
    model_vocabulary,
    prepare_as_published,
    source_fingerprint,
)
from lightning_peft.models.packing import packing_of
from lightning_peft.models.source import copy_companions, name_for_others
from lightning_peft.optim.routed_adamw import RoutedAdamW
from lightning_peft.quantization.experts import expert_stacks
from lightning_peft.quantization.weights import reads_weight
from lightning_peft.runs.folder import Start, check_same_content, end_of, folder_of, opened_folder
from lightning_peft.runs.machine import Machine
from lightning_peft.runs.plan import RunPlan, check_ranks_can_start, logging_left_to_ranks, plan_run
from lightning_peft.runs.ranks import leave_with_launcher, run_ranks
from lightning_peft.runs.rollback import (
    Rollback,
    can_roll_back,
    end_of_divergence,
    lr_factor_of,
    roll_back,
    rollbacks_of,
    taken_along,
)
from lightning_peft.runs.trainer import build_trainer, count_steps
from lightning_peft.threads import described
from lightning_peft.tracking.loggers import RunLogger
from lightning_peft.training.callbacks.adapter_checkpoint import AdapterCheckpoint
from lightning_peft.training.callbacks.adapter_health import AdapterHealth
from lightning_peft.training.callbacks.early_stopping import EarlyStopping
from lightning_peft.training.callbacks.preemption import Preemption
from lightning_peft.training.callbacks.run_record import RunRecord
from lightning_peft.training.callbacks.samples import Samples
from lightning_peft.training.callbacks.step_metrics import StepMetrics, peak_memory_gib
from lightning_peft.training.callbacks.task_metrics import Questions, TaskMetrics
from lightning_peft.training.config import GuardAction
from lightning_peft.training.guard import Diverged, Guard
from lightning_peft.training.module import FinetuneModule
from lightning_peft.training.preemption import Preempted, PreemptionSignals
from lightning_peft.training.signal_watch import SIGNAL_WATCH
from lightning_peft.training.together import Member, MemberSignals, TogetherModule

logger = logging.getLogger(__name__)

ROLLED_BACK = "rolled back"
"""Status that loggers are told where a run goes on from an earlier checkpoint; no result has it."""


def train(config: TrainConfig, member: Member | None = None) -> dict[str, Any]:
    """Run a training to its end, or on from its last checkpoint. Returns what `result.json` holds.

    With `member` it is one of several that share this process and a base (`commands/together.py`), and its ranks exist.

    Raises ValueError, before a weight is read, for anything wrong with the config, the data or the run folder; the
    reasons of `training/preemption.py` where the run is left before its end, with `result.json` written.
    With strategy=ddp or fsdp the ranks are started from here, once everything is checked, unless this process is one.
    """
    started = time.perf_counter()
    if config.cluster is not None:
        raise ValueError("cluster: train runs here; submit takes the same words and hands them to the cluster")
    plan = plan_run(config, Machine.here(config.trainer))
    check_ranks_can_start(plan)
    if plan.is_rank and member is None:
        leave_with_launcher()
    leaves_ranks = plan.is_rank and member is None and distributed.connect(plan.accelerator)
    run_dir = folder_of(config)
    with opened_folder(config) as start:
        if start.result is not None and not config.dry_run:
            return finished_before(config, plan, start, start.result)
        if plan.accelerator == "cpu" and not plan.starts_ranks and not config.dry_run:
            logger.info("%s", described())
        with logging_left_to_ranks(plan.starts_ranks and not config.dry_run):
            packs = check_model(config)
        tokenizer = load_tokenizer(config.model)
        data = read_data(config, packs, tokenizer, plan)
        scored = task_metrics(config, data, tokenizer)
        if config.dry_run:
            return {"status": "dry run"}
        content = content_of(config, data)
        distributed.on_rank_zero(lambda: check_same_content(start, run_dir, content))
        if plan.starts_ranks:
            prepare_folder(config, run_dir)
            run_ranks(run_dir / "config.yaml", plan.devices)
            return json.loads((run_dir / "result.json").read_text())
        return train_with_rollbacks(
            config, plan, start, data, tokenizer, scored, content, leaves_ranks, started, member
        )


def finished_before(config: TrainConfig, plan: RunPlan, start: Start, result: dict[str, Any]) -> dict[str, Any]:
    """Return the result of a run that is finished. Raises ValueError where its rows or its base are others now."""
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
    """Name and fingerprint of what decides a run beside its options."""
    content = {"training rows": data.fingerprint, "base weights": source_fingerprint(config.model)}
    if data.validation_fingerprint is not None:
        content["validation rows"] = data.validation_fingerprint
    return content


def read_data(config: TrainConfig, packs: bool, tokenizer: PreTrainedTokenizerFast, plan: RunPlan) -> SFTDataModule:
    """Read and check the rows, and show one where `data.preview` asks for it."""
    rows = replace(config.data, packing=packs)
    accumulate = config.trainer.get("accumulate_grad_batches", 1)
    context, vocabulary = model_context(config.model), model_vocabulary(config.model, tokenizer)
    data = SFTDataModule(rows, tokenizer, config.seed, context, accumulate, vocabulary)
    is_shown_by_ranks = plan.starts_ranks and not config.dry_run
    with logging_left_to_ranks(is_shown_by_ranks):
        data.setup()
    if config.data.preview and data.example is not None and distributed.rank() == 0 and not is_shown_by_ranks:
        Console().print(preview(data.example, tokenizer))
    return data


def train_with_rollbacks(
    config: TrainConfig,
    plan: RunPlan,
    start: Start,
    data: SFTDataModule,
    tokenizer: PreTrainedTokenizerFast,
    scored: TaskMetrics | None,
    content: dict[str, str],
    leaves_ranks: bool,
    started: float,
    member: Member | None = None,
) -> dict[str, Any]:
    """Train in this process, with guard.action=rollback from an earlier checkpoint once more where the run diverges."""
    run_dir, checkpoint = folder_of(config), start.checkpoint
    rollbacks = distributed.on_rank_zero(lambda: taken_along(run_dir, checkpoint))
    while True:
        try:
            return train_prepared(
                config, plan, checkpoint, rollbacks, data, tokenizer, scored, content, leaves_ranks, started, member
            )
        except Diverged as found:
            if not can_roll_back(config.guard, rollbacks, found):
                logger.error("%s", end_of_divergence(config.guard, rollbacks, found))
                raise
            go_back = partial(roll_back, config.guard, run_dir, found.step, found.reason)
        gc.collect()  # Trainer and module know each other, and the next ones take their place in memory
        checkpoint = distributed.on_rank_zero(go_back)
        rollbacks = distributed.on_rank_zero(lambda: rollbacks_of(run_dir))


def train_prepared(
    config: TrainConfig,
    plan: RunPlan,
    resumed: Path | None,
    rollbacks: list[Rollback],
    data: SFTDataModule,
    tokenizer: PreTrainedTokenizerFast,
    scored: TaskMetrics | None,
    content: dict[str, str],
    leaves_ranks: bool,
    started: float,
    member: Member | None = None,
) -> dict[str, Any]:
    """Train in this process, on from the checkpoint `resumed`. Returns what `result.json` holds.

    Leaves that and the adapter in the run's folder. Raises Diverged, with no result where the run is to be rolled back.
    """
    run_dir = folder_of(config)
    make = FinetuneModule if member is None else partial(TogetherModule, member)
    module = make(
        config.model, config.adapter, config.optimizer, config.schedule, config.quantization,
        config.activation_checkpointing, plan.compilation, plan.weight_dtype, config.seed, config.data.packing,
        config.objective,
    )  # fmt: skip
    if resumed is not None and (kept := saved_selection(resumed)) is not None:
        module.selection = Selection(**kept)
    module.lr_factor = lr_factor_of(rollbacks)
    module.leaves_out_steps = config.guard.action is GuardAction.skip
    lineage, layout = lineage_of(config, content, plan.precision), data.prompt_layout

    def save(module: LightningModule, folder: Path) -> None:
        assert isinstance(module, FinetuneModule)
        assert module.objective is not None
        found = replace(lineage, packing_difference=module.objective.packing_difference)
        save_tuned(module, tokenizer, folder, found, layout)

    guard = Guard(config.guard, plan.precision == "16-mixed")
    metrics = StepMetrics(guard)
    samples = read_conversations(config.data, "validation", config.validation.samples)
    signals = PreemptionSignals(plan.max_seconds)
    if member is not None:
        signals = MemberSignals(member.group, plan.max_seconds, run_dir)
    checkpoint = AdapterCheckpoint(config.checkpoint, run_dir, save, metrics.is_calm)
    stopping = EarlyStopping(config.early_stopping) if config.early_stopping.metric is not None else None
    callbacks: list[Callback] = [
        RunRecord(plain(config), content),
        AdapterHealth(config.health),
        metrics,
        *([scored] if scored is not None else []),
        *([stopping] if stopping is not None else []),
        Samples([conversation for _, conversation in samples], tokenizer, run_dir, layout),
        checkpoint,
        Preemption(signals, checkpoint, config.pause_at),
    ]
    trainer = build_trainer(config, plan, count_steps(config.trainer, data), callbacks)
    distributed.on_rank_zero(lambda: prepare_folder(config, run_dir))
    if plan.accelerator == "cuda":
        torch.cuda.reset_peak_memory_stats()
    result: dict[str, Any] = {"status": "failed"}
    try:
        fit(trainer, module, data, resumed, signals)
        if isinstance(routed := trainer.optimizers[0], RoutedAdamW) and distributed.rank() == 0:
            (run_dir / "wins.json").write_text(json.dumps(routed.report(), indent=2) + "\n")
        if module.selection is not None and distributed.rank() == 0:
            (run_dir / "selection.json").write_text(json.dumps(vars(module.selection), indent=2) + "\n")
            Console().print(table_of(module.selection))
        save(module, run_dir / "adapter")
        if distributed.rank() == 0 and (run_dir / "adapter").is_dir():
            check_in_peft(run_dir / "adapter", module)
        trainable, total = trainable_parameter_counts(module.model)
        losses = final_validation(trainer, module, data)
        result = {
            "status": "finished",
            "end": end_of(config.trainer),
            "steps": trainer.global_step,
            "train_loss": metrics.loss,
            "validation_loss": losses.get("validation_loss"),
            "metrics": by_source(losses) | ({} if scored is None else scored.values),
            "data": counts_of(data.train_audit),
            "trainable_parameters": trainable,
            "total_parameters": total,
            "tokens_per_second": metrics.tokens_per_second(),
            "peak_memory_gib": distributed.worst(peak_memory_gib(trainer.strategy.root_device)),
            "device": torch.cuda.get_device_name() if plan.accelerator == "cuda" else "cpu",
        }
        if stopping is not None and stopping.reason is not None:
            result["stopped_early"] = stopping.reason
    except Preempted as left:
        result |= {"status": left.status, "steps": trainer.global_step, "train_loss": metrics.loss}
        result |= last_validation(trainer, scored)
        leaves_ranks = leaves_ranks and left.__cause__ is None
        if isinstance(left, Diverged):
            result["diverged"] = {"step": left.step, "reason": left.reason}
            if can_roll_back(config.guard, rollbacks, left):
                result["status"], leaves_ranks = ROLLED_BACK, False
        raise
    finally:
        SIGNAL_WATCH.leaves_by_itself()
        result.setdefault("peak_memory_gib", peak_memory_gib(trainer.strategy.root_device))
        result |= {"seconds": time.perf_counter() - started, "versions": installed_versions()}
        if rollbacks:
            result |= {"rollbacks": len(rollbacks), "lr_factor": module.lr_factor}
        if guard.left_out:
            result["steps_left_out"] = guard.left_out
        if distributed.rank() == 0 and result["status"] != ROLLED_BACK:
            with atomic_file(run_dir / "result.json") as path:
                path.write_text(json.dumps(finite(result), indent=2, allow_nan=False) + "\n")
            for folder in (run_dir / "adapter", run_dir / MODEL_FOLDER):
                if folder.is_dir() and result["status"] == "finished":
                    write_card(folder, run_dir)
        if distributed.rank() == 0:
            for run_logger in trainer.loggers:
                if isinstance(run_logger, RunLogger):
                    run_logger.close(result["status"], run_dir / "adapter")
        if leaves_ranks and result["status"] not in ("finished", "failed"):
            distributed.disconnect()  # one that leaves alone has srun end the others, which may still be writing
        signals.stop()
    if distributed.rank() == 0:
        show_result(result, run_dir)
    if leaves_ranks:
        distributed.disconnect()
    return result


def finite(value: Any) -> Any:
    """Return the value with null for the numbers that JSON does not have: nan and inf."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def prepare_folder(config: TrainConfig, run_dir: Path) -> None:
    """Leave the resolved config in the run's folder, from which ranks start, and no result of an earlier start."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "result.json").unlink(missing_ok=True)
    with atomic_file(run_dir / "config.yaml") as path:
        OmegaConf.save(OmegaConf.create(plain(config)), path)


def fit(
    trainer: Trainer, module: FinetuneModule, data: SFTDataModule, checkpoint: Path | None, signals: PreemptionSignals
) -> None:
    """`trainer.fit`, with the ways it can be ended from outside told apart."""
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    except Preempted:
        raise
    except SystemExit as stop:
        if trainer.interrupted:
            raise KeyboardInterrupt from stop
        raise
    except Exception as error:
        if signals.received is None:
            raise
        # The signal also went to other ranks and to services that this one talks to. A defect shows again next time.
        has_reason = not distributed.is_lost_rank(error)
        logger.warning("%s, then an error taken for its consequence", signals.received.name, exc_info=has_reason)
        raise Preempted from error


def check_model(config: TrainConfig) -> bool:
    """Find the target layers on an empty model, so that a wrong pattern costs no loading; print them on a dry run.

    Return whether samples are packed.
    """
    if config.adapter.init_from is not None:
        folder = adapter_folder(config.adapter.init_from, "adapter.init_from")
        check_lineage(folder, source_fingerprint(config.model), config.quantization.kind.name, model_name(config.model))
    model = empty_model(config.model)
    if (form := prepare_as_published(model, config.model)) is not None:
        check_fits_published(form, config.adapter, config.quantization)
    method = METHODS[config.adapter.method]
    targets = find_targets(model, config.adapter, tuple(method.layers)) if method.layers else []
    packs = packing_of(config.data, model)
    if config.dry_run:
        inject_adapters(model, config.adapter)
        Console().print(describe_targets(targets, model))
    return packs


def lineage_of(config: TrainConfig, content: dict[str, str], precision: str) -> Lineage:
    return Lineage(
        base_fingerprint=content["base weights"],
        base_name=model_name(config.model),
        method=config.adapter.method,
        objective=config.objective.name,
        quantization=config.quantization.kind.name,
        precision=precision,
        config=plain(config),
        data_fingerprint=content["training rows"],
    )


def save_tuned(
    module: FinetuneModule, tokenizer: PreTrainedTokenizerFast, folder: Path, lineage: Lineage, layout: PromptLayout
) -> None:
    """Write the adapter folder, or after full fine-tuning a whole model in its place, with the layout of prompts."""
    layout = layout.with_stops(sorted(declared_end_ids(module.model)))
    if not METHODS[module.adapter_config.method].trains_all:
        added = tokenizer if module.model_config.new_tokens else None

        def beside(partial: Path) -> None:
            layout.save(partial)
            write_card(partial)

        base = name_for_others(module.model_config)
        save_adapter(module.model, module.adapter_config, folder, base, lineage, added, beside)
        return
    has_adapters = next(adapters(module.model), None) is not None
    state = merged_state(module.model) if has_adapters else whole_state(module.model)
    if distributed.rank() != 0:
        return
    with atomic_folder(folder.with_name(folder.name.replace("adapter", MODEL_FOLDER))) as partial:
        save_model(module.model, tokenizer, partial, None if has_adapters else module.model.dtype, state)
        copy_companions(module.model_config, partial)
        write_lineage(lineage, partial)
        layout.save(partial)
        write_card(partial)


def is_read_otherwise(model: PreTrainedModel) -> bool:
    """Return whether HF PEFT may rename or refuse layers of the model: with experts, or layers whose weight is read.

    Of others it takes the names as they are, and importing it takes seconds.
    """
    if expert_stacks(model):
        return True
    parents = [module for module in model.modules() if not isinstance(module, Adapter)]
    return any(reads_weight(parent, leaf) for parent in parents for leaf, _ in parent.named_children())


def check_in_peft(folder: Path, module: FinetuneModule) -> None:
    """Say where HF PEFT would not read the adapter as it is."""
    if not spelling(module.adapter_config.method).in_peft or not is_read_otherwise(module.model):
        return
    if (objection := objection_of_peft(folder, module.model)) is not None:
        logger.warning("%s: %s; lightning-peft reads and merges it", folder, objection)


def task_metrics(config: TrainConfig, data: SFTDataModule, tokenizer: PreTrainedTokenizerFast) -> TaskMetrics | None:
    """Prepare `validation.metrics`; None where there are none. Raises ValueError for what these rows cannot give."""
    if not config.validation.metrics:
        return None
    found = read_conversations(config.data, "validation")
    columns = sorted({"prompt", "completion"}.union(*(row for row, _ in found)))
    scorers = scorers_of(config.validation.metrics, config.data.task, columns)
    context, most = model_context(config.model), config.validation.max_new_tokens
    answer = most or max(scorer.max_new_tokens for scorer in scorers)
    longest = None if context is None else context - answer
    questions = Questions.of(found, tokenizer, data.prompt_layout, config.validation.metric_rows, longest)
    return TaskMetrics(config.validation, scorers, questions, tokenizer)


def final_validation(trainer: Trainer, module: FinetuneModule, data: SFTDataModule) -> dict[str, float]:
    """What a validation gives: the loss per supervised token among it; empty when the data set has no such rows."""
    loader = data.val_dataloader()
    if not loader:
        return {}
    trainer.limit_val_batches = 1.0
    (metrics,) = trainer.validate(module, dataloaders=loader, verbose=False)
    return dict(metrics)


def by_source(losses: Mapping[str, Any]) -> dict[str, float]:
    """The validation losses of the sources of a mixture."""
    return {name: float(loss) for name, loss in losses.items() if name.startswith("validation_loss/")}


def counts_of(audit: Audit) -> dict[str, int | float]:
    """The numbers of the audit of the training rows."""
    return {name: value for name, value in vars(audit).items() if type(value) in (int, float)}


def last_validation(trainer: Trainer, scored: TaskMetrics | None) -> dict[str, Any]:
    """What a validation after the step at which the run is left has given; empty where there was none."""
    seen = trainer.callback_metrics
    if "validation_loss" not in seen or int(seen["step"]) != trainer.global_step:
        return {}
    is_scored = scored is not None and scored.scored_step == trainer.global_step
    metrics = by_source(seen) | (scored.values if scored and is_scored else {})
    return {"validation_loss": float(seen["validation_loss"]), "metrics": metrics}


def show_result(result: dict[str, Any], run_dir: Path) -> None:
    table = Table(show_header=False, title=f"{result['status']}: {os.path.relpath(run_dir)}")
    rows: dict[str, tuple[str, Callable[[Any], str]]] = {
        "steps": ("steps", readable.number),
        "train_loss": ("train loss", readable.loss),
        "validation_loss": ("validation loss", readable.loss),
        **{name: (name, readable.loss) for name in result["metrics"]},
        "trainable_parameters": ("trainable parameters", readable.number),
        "total_parameters": ("total parameters", readable.number),
        "tokens_per_second": ("tokens per second", readable.number),
        "peak_memory_gib": ("peak memory", lambda value: f"{value:.2f} GiB"),
        "seconds": ("time", readable.duration),
    }
    for name, (label, written) in rows.items():
        value = result.get(name, result["metrics"].get(name))
        table.add_row(label, "-" if value is None else written(value))
    Console().print(table)
