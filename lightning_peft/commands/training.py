"""One training in this process, from checked rows and options to an adapter and `result.json` in the run's folder."""

import gc
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerFast

from lightning_peft import distributed, readable
from lightning_peft.adapters.hybrid_lora import table_of
from lightning_peft.adapters.inject import trainable_parameter_counts
from lightning_peft.adapters.method import Selection
from lightning_peft.checkpoint.atomic import atomic_file, check_is_there, write_text
from lightning_peft.checkpoint.lineage import installed_versions
from lightning_peft.checkpoint.model_card import write_card
from lightning_peft.checkpoint.resume import saved_selection
from lightning_peft.commands.tuned import check_in_peft, lineage_of, save_tuned
from lightning_peft.config import TrainConfig, as_yaml, plain
from lightning_peft.data.audit import Audit
from lightning_peft.data.datamodule import SFTDataModule
from lightning_peft.data.layout import PromptLayout
from lightning_peft.data.samples import read_conversations
from lightning_peft.inference.load import MODEL_FOLDER, adapter_folder
from lightning_peft.objectives.registry import OBJECTIVES
from lightning_peft.objectives.teacher import TaughtConfig
from lightning_peft.optim.routed_adamw import RoutedAdamW
from lightning_peft.plugins import OWN_FILES, keep_modules
from lightning_peft.runs.command import kept_commands
from lightning_peft.runs.errors import one_line
from lightning_peft.runs.folder import end_of, folder_of
from lightning_peft.runs.nodes import refusal
from lightning_peft.runs.plan import RunPlan
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
from lightning_peft.strict_json import json_text
from lightning_peft.sweeps.foreground import how_to_go_on
from lightning_peft.tracking.loggers import RunLogger
from lightning_peft.training.callbacks.adapter_checkpoint import AdapterCheckpoint
from lightning_peft.training.callbacks.adapter_health import AdapterHealth
from lightning_peft.training.callbacks.early_stopping import EarlyStopping
from lightning_peft.training.callbacks.preemption import Preemption
from lightning_peft.training.callbacks.run_record import RunRecord
from lightning_peft.training.callbacks.step_metrics import StepMetrics, peak_memory_gib
from lightning_peft.training.callbacks.task_metrics import TaskMetrics
from lightning_peft.training.callbacks.validation_answers import ValidationAnswers
from lightning_peft.training.config import ActivationCheckpointing, GuardAction
from lightning_peft.training.guard import Diverged, Guard
from lightning_peft.training.model_flops import why_slow
from lightning_peft.training.module import FinetuneModule
from lightning_peft.training.preemption import Preempted, PreemptionSignals
from lightning_peft.training.signal_watch import SIGNAL_WATCH
from lightning_peft.training.teacher_store import keep_teacher
from lightning_peft.training.together import Member, MemberSignals
from lightning_peft.training.together_module import TogetherModule

logger = logging.getLogger(__name__)

ROLLED_BACK = "rolled back"
"""Status for loggers where a run goes on from an earlier checkpoint; no result has this status."""


@dataclass(frozen=True)
class Prepared:
    """A run whose options, rows and folder are checked."""

    config: TrainConfig
    plan: RunPlan
    data: SFTDataModule
    tokenizer: PreTrainedTokenizerFast
    scored: TaskMetrics | None
    """The metrics of answers while the run trains; None without any."""
    content: dict[str, str]
    """Name and fingerprint of what decides the run beside its options."""
    started: float
    """`time.perf_counter()` at its start."""
    leaves_ranks: bool
    """True where this process is a rank that leaves the others at the end."""
    member: Member | None = None
    """The run's place among several that share this process and a base."""

    @property
    def run_dir(self) -> Path:
        return folder_of(self.config)


def train_with_rollbacks(run: Prepared, checkpoint: Path | None) -> dict[str, Any]:
    """Train in this process, with guard.action=rollback from an earlier checkpoint once more where the run diverges."""
    config, run_dir = run.config, run.run_dir
    rollbacks = distributed.on_rank_zero(lambda: taken_along(run_dir, checkpoint))
    while True:
        try:
            return train_prepared(run, checkpoint, rollbacks)
        except Diverged as found:
            if not can_roll_back(config.guard, rollbacks, found):
                logger.error("%s", end_of_divergence(config.guard, rollbacks, found))
                raise
            go_back = partial(roll_back, config.guard, run_dir, found.step, found.reason)
        gc.collect()  # Trainer and module know each other, and the next ones take their place in memory
        checkpoint = distributed.on_rank_zero(go_back)
        rollbacks = distributed.on_rank_zero(lambda: rollbacks_of(run_dir))


def say_other_prompts(init_from: str, layout: PromptLayout) -> None:
    """Log a line where prompts are not those that the adapter was trained on which the run starts from."""
    before = PromptLayout.load(adapter_folder(init_from, "adapter.init_from"))
    if before is not None and (difference := layout.changed_from(before)) is not None:
        logger.warning("adapter.init_from=%s: the prompts of this run are %s", init_from, difference)


def train_prepared(run: Prepared, resumed: Path | None, rollbacks: list[Rollback]) -> dict[str, Any]:
    """Train in this process, on from the checkpoint `resumed`; return what `result.json` holds.

    The result and the adapter are left in the run's folder. Raises Diverged, with no result where the run is to be
    rolled back.
    """
    config, plan, data, tokenizer, scored = run.config, run.plan, run.data, run.tokenizer, run.scored
    run_dir, content, member, leaves_ranks = run.run_dir, run.content, run.member, run.leaves_ranks
    if isinstance(config.objective, TaughtConfig) and not config.objective.runs_teacher:
        device = torch.device(plan.accelerator if plan.accelerator == "cuda" else "cpu")
        assert config.data.cache_dir is not None, "checked with the options"
        keep_teacher(
            data, config.objective, config.model, config.quantization, plan.weight_dtype, device, config.data.cache_dir
        )  # fmt: skip
        gc.collect()
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
    if config.adapter.init_from is not None and resumed is None and distributed.rank() == 0:
        say_other_prompts(config.adapter.init_from, layout)

    def save(module: LightningModule, folder: Path) -> None:
        assert isinstance(module, FinetuneModule)
        assert module.objective is not None
        if distributed.rank() == 0:
            check_is_there(run_dir)
        found = replace(lineage, packing_difference=module.objective.packing_difference)
        save_tuned(module, tokenizer, folder, found, layout)

    guard = Guard(config.guard, plan.precision == "16-mixed")
    metrics = StepMetrics(guard)
    asked = config.validation.samples
    if asked and OBJECTIVES[config.objective.name].gives_rewards:
        logger.info("validation.samples=%d: none is written, as a reward model writes no answers", asked)
        asked = 0
    samples = read_conversations(config.data, "validation", asked, tokenizer=tokenizer)
    signals = PreemptionSignals(plan.max_seconds)
    if member is not None:
        signals = MemberSignals(member.group, plan.max_seconds, run_dir)
    checkpoint = AdapterCheckpoint(config.checkpoint, run_dir, save, metrics.is_calm)
    stopping = EarlyStopping(config.early_stopping) if config.early_stopping.metric is not None else None
    preemption = Preemption(
        signals, checkpoint, config.pause_at, lambda trainer: last_validation(trainer, scored), how_to_go_on
    )
    health = AdapterHealth(config.health)
    callbacks: list[Callback] = [
        RunRecord(plain(config), content),
        health,
        metrics,
        *([scored] if scored is not None else []),
        *([stopping] if stopping is not None else []),
        ValidationAnswers([conversation for _, conversation in samples], tokenizer, run_dir, layout),
        checkpoint,
        preemption,
    ]
    trainer = build_trainer(config, plan, count_steps(config.trainer, data), callbacks)
    distributed.on_rank_zero(lambda: prepare_folder(config, run_dir))
    # The folder comes after the Trainer, as a start that is refused leaves no folder.
    lineage = replace(lineage, commands=distributed.on_rank_zero(lambda: kept_commands(run_dir)))
    if plan.accelerator == "cuda":
        torch.cuda.reset_peak_memory_stats()
    result: dict[str, Any] = {"status": "failed"}
    caught = sys.exception()
    try:
        fit(trainer, module, data, resumed, signals, config.callbacks)
        if isinstance(routed := trainer.optimizers[0], RoutedAdamW) and distributed.rank() == 0:
            write_text(run_dir / "wins.json", json_text(routed.report()))
        if module.selection is not None and distributed.rank() == 0:
            write_text(run_dir / "selection.json", json_text(vars(module.selection)))
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
            "metrics": beside_the_loss(losses) | ({} if scored is None else scored.values),
            "data": counts_of(data.train_audit),
            "trainable_parameters": trainable,
            "total_parameters": total,
            "tokens_per_second": metrics.tokens_per_second(),
            "peak_memory_gib": distributed.worst(peak_memory_gib(trainer.strategy.root_device)),
            "device": torch.cuda.get_device_name() if plan.accelerator == "cuda" else "cpu",
        }
        warnings = health.at_the_end(trainer, module)  # once the adapter is saved, as it takes memory
        # In runs together a step's seconds are those of all runs, its tokens those of one.
        if member is None and (utilization := metrics.utilization()) is not None:
            result["mfu"] = utilization
            cuts = config.trainer.get("accumulate_grad_batches", 1)
            tokens = metrics.tokens_of_a_step() / plan.ranks / cuts
            recomputes = config.activation_checkpointing not in (
                ActivationCheckpointing.none,
                ActivationCheckpointing.elementwise,
            )
            if (slow := why_slow(utilization, tokens, plan.precision, recomputes, cuts > 1)) is not None:
                warnings.append(slow)
        if stopping is not None and stopping.reason is not None:
            result["stopped_early"] = stopping.reason
        if warnings:
            result["warnings"] = warnings
    except Preempted as left:
        result |= {"status": left.status, "steps": trainer.global_step, "train_loss": metrics.loss}
        result |= preemption.last_validation()
        leaves_ranks = leaves_ranks and left.__cause__ is None
        if isinstance(left, Diverged):
            result["diverged"] = {"step": left.step, "reason": left.reason, "rows": left.rows}
            if can_roll_back(config.guard, rollbacks, left):
                result["status"], leaves_ranks = ROLLED_BACK, False
        raise
    finally:
        SIGNAL_WATCH.leaves_by_itself()
        result.setdefault("peak_memory_gib", peak_memory_gib(trainer.strategy.root_device))
        seconds = time.perf_counter() - run.started
        hours = seconds * trainer.world_size / 3600 / (1 if member is None else len(member.group.members))
        result |= {"seconds": seconds, "device_hours": hours, "content": content, "versions": installed_versions()}
        if rollbacks:
            result |= {"rollbacks": len(rollbacks), "lr_factor": module.lr_factor}
        if guard.left_out:
            result["steps_left_out"] = guard.left_out
        # A folder that was moved meanwhile is not made anew, which would hold nothing else.
        if distributed.rank() == 0 and result["status"] != ROLLED_BACK and run_dir.is_dir():
            with first_error_counts(caught):
                write_result(result, run_dir)
        if distributed.rank() == 0:
            for run_logger in trainer.loggers:
                if isinstance(run_logger, RunLogger):
                    run_logger.close(result["status"], run_dir / "adapter")
        if leaves_ranks and result["status"] not in ("finished", "failed"):
            distributed.disconnect()  # a rank that leaves alone has srun end the others, which may still write
        signals.stop()
    if distributed.rank() == 0:
        show_result(result, run_dir)
    if leaves_ranks:
        distributed.disconnect()
    return result


@contextmanager
def first_error_counts(caught: BaseException | None) -> Iterator[None]:
    """Log a failed file operation inside where an exception is on its way; one of that kind says enough for both.

    `caught` is the exception that a caller has in hand, as one that tries again, and that is on no way.
    """
    first = sys.exception()
    try:
        yield
    except OSError as error:
        if first is caught:
            raise
        if not isinstance(first, OSError):
            logger.warning("%s", one_line(error))


def write_result(result: Mapping[str, Any], run_dir: Path) -> None:
    """Write `result.json`, and the card of what a finished run has trained."""
    with atomic_file(run_dir / "result.json") as path:
        path.write_text(json_text(result))
    for folder in (run_dir / "adapter", run_dir / MODEL_FOLDER):
        if folder.is_dir() and result["status"] == "finished":
            write_card(folder, run_dir)


def fit(
    trainer: Trainer,
    module: FinetuneModule,
    data: SFTDataModule,
    checkpoint: Path | None,
    signals: PreemptionSignals,
    callbacks: Mapping[str, Any],
) -> None:
    """Call `trainer.fit` and tell apart the ways it can be ended from outside.

    Raises ValueError for what Lightning refuses of the user's options, the callbacks that the config names among them.
    """
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
            if (refused := refusal(error, callbacks)) is not None:
                raise ValueError(refused) from error
            raise
        # The signal also went to other ranks and to services that this one talks to. A defect shows again next time.
        has_reason = not distributed.is_lost_rank(error)
        logger.warning("%s, then an error taken for its consequence", signals.received.name, exc_info=has_reason)
        raise Preempted from error


def final_validation(trainer: Trainer, module: FinetuneModule, data: SFTDataModule) -> dict[str, float]:
    """Return a validation's results, the loss per supervised token among them; empty without validation rows."""
    loader = data.val_dataloader()
    if not loader:
        return {}
    trainer.limit_val_batches = 1.0
    (metrics,) = trainer.validate(module, dataloaders=loader, verbose=False)
    return dict(metrics)


def beside_the_loss(found: Mapping[str, Any]) -> dict[str, float]:
    """Return a validation's results beside its loss: the losses by source of a mixture, the objective's measures."""
    names = (name for name in found if name.startswith("validation_") and name != "validation_loss")
    return {name: float(found[name]) for name in names}


def counts_of(audit: Audit) -> dict[str, int | float]:
    """Return the numbers of the audit of the training rows."""
    return {name: value for name, value in vars(audit).items() if type(value) in (int, float)}


def last_validation(trainer: Trainer, scored: TaskMetrics | None) -> dict[str, Any]:
    """Return the results of a validation after the step at which the run is left; empty without one."""
    seen = trainer.callback_metrics
    if "validation_loss" not in seen or int(seen["step"]) != trainer.global_step:
        return {}
    is_scored = scored is not None and scored.scored_step == trainer.global_step
    metrics = beside_the_loss(seen) | (scored.values if scored and is_scored else {})
    return {"validation_loss": float(seen["validation_loss"]), "metrics": metrics}


def prepare_folder(config: TrainConfig, run_dir: Path) -> None:
    """Leave the resolved config in the run's folder, from which ranks start, and no result of an earlier start."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "result.json").unlink(missing_ok=True)
    with atomic_file(run_dir / "config.yaml") as path:
        path.write_text(as_yaml(config), encoding="utf-8")
    keep_modules(config.imports, run_dir / OWN_FILES)


def show_result(result: dict[str, Any], run_dir: Path) -> None:
    print(f"{result['status']}: {os.path.relpath(run_dir)}")  # as a title of the table a long path would be broken
    table = Table(show_header=False)
    rows: dict[str, tuple[str, Callable[[Any], str]]] = {
        "steps": ("steps", readable.number),
        "train_loss": ("train loss", readable.loss),
        "validation_loss": ("validation loss", readable.loss),
        **{name: (name, readable.loss) for name in result["metrics"]},
        "trainable_parameters": ("trainable parameters", readable.number),
        "total_parameters": ("total parameters", readable.number),
        "tokens_per_second": ("tokens per second", readable.number),
        "mfu": ("share of the GPU's peak", lambda value: f"{value:.0%}"),
        "peak_memory_gib": ("peak memory", lambda value: f"{value:.2f} GiB"),
        "seconds": ("time", readable.duration),
    }
    for name, (label, written) in rows.items():
        value = result.get(name, result["metrics"].get(name))
        if name == "mfu" and value is None:  # no GPU, or one whose peak is not known
            continue
        table.add_row(label, "-" if value is None or math.isnan(value) else written(value))
    Console().print(table)
    for warning in result.get("warnings", []):
        print(warning)
