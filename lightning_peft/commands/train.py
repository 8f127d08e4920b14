"""`lightning-peft train`: from a resolved config to an adapter, its metrics and its lineage in one run folder."""

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerFast

from lightning_peft import distributed
from lightning_peft.adapters.inject import describe_targets, inject_adapters, trainable_parameter_counts
from lightning_peft.adapters.registry import METHODS
from lightning_peft.adapters.targets import find_targets
from lightning_peft.checkpoint.atomic import atomic_file, atomic_folder
from lightning_peft.checkpoint.lineage import Lineage, check_lineage, installed_versions, write_lineage
from lightning_peft.checkpoint.merged import save_model
from lightning_peft.checkpoint.peft_check import objection_of_peft
from lightning_peft.checkpoint.peft_format import save_adapter
from lightning_peft.checkpoint.peft_methods import PEFT_METHODS
from lightning_peft.checkpoint.resume import whole_state
from lightning_peft.commands.ranks import leave_with_launcher, run_ranks
from lightning_peft.commands.run_folder import find_start
from lightning_peft.commands.trainer import (
    build_trainer,
    check_trainer_options,
    count_ranks,
    count_steps,
    resolve_accelerator,
)
from lightning_peft.config import TrainConfig, plain
from lightning_peft.data.audit import preview
from lightning_peft.data.datamodule import SFTDataModule
from lightning_peft.data.samples import read_conversations
from lightning_peft.inference.load import MODEL_FOLDER, adapter_folder
from lightning_peft.models.loading import empty_model, load_tokenizer, model_context, model_name, source_fingerprint
from lightning_peft.models.packing import packing_of
from lightning_peft.training.callbacks.adapter_checkpoint import AdapterCheckpoint
from lightning_peft.training.callbacks.preemption import Preemption
from lightning_peft.training.callbacks.run_record import RunRecord
from lightning_peft.training.callbacks.samples import Samples
from lightning_peft.training.callbacks.step_metrics import StepMetrics, peak_memory_gib
from lightning_peft.training.compilation import resolve_compilation
from lightning_peft.training.config import StrategyKind
from lightning_peft.training.loggers import RunLogger
from lightning_peft.training.module import FinetuneModule
from lightning_peft.training.precision import resolve_precision, weight_dtype
from lightning_peft.training.preemption import Preempted, PreemptionSignals

logger = logging.getLogger(__name__)


def train(config: TrainConfig) -> dict[str, Any]:
    """Run a training to its end, or on from its last checkpoint. Returns what `result.json` holds.

    Raises ValueError, before a weight is read, for anything wrong with the config, the data or the run folder;
    KeyboardInterrupt after Ctrl-C and Preempted after the signals of `training/preemption.py`, `result.json` written.
    With strategy=ddp or fsdp the ranks are started from here, once everything is checked, unless this process is one.
    """
    started = time.perf_counter()
    if config.cluster is not None:
        raise ValueError("cluster: train runs here; submit takes the same words and hands them to the cluster")
    check_trainer_options(config.trainer)
    accelerator = resolve_accelerator(str(config.trainer.get("accelerator", "auto")))
    precision = resolve_precision(str(config.trainer.get("precision", "auto")), accelerator, trains_all(config))
    devices, nodes = count_ranks(config.trainer, config.strategy.kind, accelerator)
    starts_ranks = config.strategy.kind is not StrategyKind.single and not distributed.are_ranks_started()
    with logging_left_to_ranks(starts_ranks):
        compilation = resolve_compilation(config.compile, accelerator, config.activation_checkpointing)
    check_ranks(config, precision, nodes if starts_ranks else 1)
    is_rank = config.strategy.kind is not StrategyKind.single and not starts_ranks
    if is_rank:
        leave_with_launcher()
    leaves_ranks = is_rank and distributed.connect(accelerator)
    assert config.run_dir is not None, "the config composes a run_dir"
    run_dir = Path(config.run_dir)
    start = distributed.on_rank_zero(lambda: find_start(config, run_dir))
    if start.result is not None and not config.dry_run:
        logger.info("%s is finished: nothing left to do", run_dir)
        return start.result

    with logging_left_to_ranks(starts_ranks and not config.dry_run):
        packs = check_model(config)
    tokenizer = load_tokenizer(config.model)
    accumulate = config.trainer.get("accumulate_grad_batches", 1)
    data_config = replace(config.data, packing=packs)
    data = SFTDataModule(data_config, tokenizer, config.seed, model_context(config.model), accumulate)
    with logging_left_to_ranks(starts_ranks and not config.dry_run):
        data.setup()
    if starts_ranks and not config.dry_run:
        prepare_folder(config, run_dir)
        run_ranks(run_dir / "config.yaml", devices)
        return json.loads((run_dir / "result.json").read_text())
    if config.data.preview and data.example is not None and distributed.rank() == 0:
        Console().print(preview(data.example, tokenizer))
    if config.dry_run:
        return {"status": "dry run"}

    module = FinetuneModule(
        config.model, config.adapter, config.optimizer, config.schedule, config.quantization,
        config.activation_checkpointing,
        compilation,
        weight_dtype(precision, trains_all(config)), config.seed,
    )  # fmt: skip
    lineage = lineage_of(config, data.fingerprint, precision)

    def save(module: LightningModule, folder: Path) -> None:
        assert isinstance(module, FinetuneModule)
        assert module.objective is not None
        found = replace(lineage, packing_difference=module.objective.packing_difference)
        save_tuned(module, tokenizer, folder, found)

    metrics = StepMetrics()
    samples = read_conversations(config.data, "validation", config.validation.samples)
    signals = PreemptionSignals()
    checkpoint = AdapterCheckpoint(config.checkpoint, run_dir, save)
    callbacks: list[Callback] = [
        RunRecord(plain(config)),
        metrics,
        Samples([conversation for _, conversation in samples], tokenizer, run_dir),
        checkpoint,
        Preemption(signals, checkpoint),
    ]
    trainer = build_trainer(config, count_steps(config.trainer, data), accelerator, precision, callbacks)
    distributed.on_rank_zero(lambda: prepare_folder(config, run_dir))
    if accelerator == "cuda":
        torch.cuda.reset_peak_memory_stats()
    result: dict[str, Any] = {"status": "failed"}
    try:
        fit(trainer, module, data, start.checkpoint, signals)
        save(module, run_dir / "adapter")
        if distributed.rank() == 0 and (run_dir / "adapter").is_dir():
            check_in_peft(run_dir / "adapter", module)
        trainable, total = trainable_parameter_counts(module.model)
        result = {
            "status": "finished",
            "steps": trainer.global_step,
            "train_loss": metrics.loss,
            "validation_loss": final_validation(trainer, module, data),
            "metrics": {},
            "trainable_parameters": trainable,
            "total_parameters": total,
            "tokens_per_second": metrics.tokens_per_second(),
            "peak_memory_gib": distributed.worst(peak_memory_gib(trainer.strategy.root_device)),
        }
    except Preempted as left:
        result["status"] = "preempted"
        leaves_ranks = leaves_ranks and left.__cause__ is None
        raise
    finally:
        result.setdefault("peak_memory_gib", peak_memory_gib(trainer.strategy.root_device))
        result |= {"seconds": time.perf_counter() - started, "versions": installed_versions()}
        if distributed.rank() == 0:
            (run_dir / "result.json").write_text(json.dumps(result, indent=2) + "\n")
            for run_logger in trainer.loggers:
                if isinstance(run_logger, RunLogger):
                    run_logger.close(result["status"], run_dir / "adapter")
        if leaves_ranks and result["status"] == "preempted":
            distributed.disconnect()  # one that leaves alone has srun end the others, which may still be writing
        signals.stop()
    if distributed.rank() == 0:
        show_result(result, run_dir)
    if leaves_ranks:
        distributed.disconnect()
    return result


def check_ranks(config: TrainConfig, precision: str, nodes: int) -> None:
    """Raises ValueError for what several processes cannot do; `nodes` is how many ranks are to be started on."""
    if nodes > 1:
        raise ValueError(
            f"trainer.num_nodes={nodes}: ranks on other nodes are started by srun or torchrun, as in "
            "srun python -m lightning_peft train config_path=RUN/config.yaml"
        )
    if config.strategy.kind is StrategyKind.fsdp and precision == "16-mixed":
        raise ValueError("trainer.precision=16-mixed strategy=fsdp: use bf16-true, bf16-mixed or 32-true")
    if config.strategy.kind is StrategyKind.fsdp and config.adapter.method == "adalora":
        raise ValueError(
            "method=adalora strategy=fsdp: its penalty reads whole matrices outside the forward pass, where they are "
            "sharded; use strategy=ddp"
        )


def prepare_folder(config: TrainConfig, run_dir: Path) -> None:
    """Leave the resolved config in the run's folder, from which ranks start, and no result of an earlier start."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "result.json").unlink(missing_ok=True)
    with atomic_file(run_dir / "config.yaml") as path:
        OmegaConf.save(OmegaConf.create(plain(config)), path)


@contextmanager
def logging_left_to_ranks(left: bool) -> Iterator[None]:
    """Inside, nothing below an error is logged: the ranks check the same again, and rank zero says it."""
    package = logging.getLogger("lightning_peft")
    level = package.level
    package.setLevel(logging.ERROR if left else level)
    try:
        yield
    finally:
        package.setLevel(level)


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
        logger.warning("%s, then an error taken for its consequence", signals.received.name, exc_info=True)
        raise Preempted from error


def trains_all(config: TrainConfig) -> bool:
    return not METHODS[config.adapter.method].layers


def check_model(config: TrainConfig) -> bool:
    """Find the target layers on an empty model, so that a wrong pattern costs no loading; print them on a dry run.

    Returns whether samples are packed.
    """
    if config.adapter.init_from is not None:
        folder = adapter_folder(config.adapter.init_from, "adapter.init_from")
        check_lineage(folder, source_fingerprint(config.model), config.quantization.kind.name, model_name(config.model))
    model = empty_model(config.model)
    method = METHODS[config.adapter.method]
    targets = find_targets(model, config.adapter, tuple(method.layers)) if method.layers else []
    packs = packing_of(config.data, model)
    if config.dry_run:
        inject_adapters(model, config.adapter)
        Console().print(describe_targets(targets, model))
    return packs


def lineage_of(config: TrainConfig, data_fingerprint: str, precision: str) -> Lineage:
    return Lineage(
        base_fingerprint=source_fingerprint(config.model),
        base_name=model_name(config.model),
        method=config.adapter.method,
        quantization=config.quantization.kind.name,
        precision=precision,
        config=plain(config),
        data_fingerprint=data_fingerprint,
    )


def save_tuned(module: FinetuneModule, tokenizer: PreTrainedTokenizerFast, folder: Path, lineage: Lineage) -> None:
    """Write the adapter folder, or after full fine-tuning a whole model in its place."""
    if METHODS[module.adapter_config.method].layers:
        added = tokenizer if module.model_config.new_tokens else None
        save_adapter(module.model, module.adapter_config, folder, lineage.base_name, lineage, added)
        return
    state = whole_state(module.model)
    if distributed.rank() != 0:
        return
    with atomic_folder(folder.with_name(folder.name.replace("adapter", MODEL_FOLDER))) as partial:
        save_model(module.model, tokenizer, partial, module.model.dtype, state)
        write_lineage(lineage, partial)


def check_in_peft(folder: Path, module: FinetuneModule) -> None:
    """Say where HF PEFT would not read the adapter as it is."""
    if not PEFT_METHODS[module.adapter_config.method].in_peft:
        return
    if (objection := objection_of_peft(folder, module.model)) is not None:
        logger.warning("%s: %s; lightning-peft reads and merges it", folder, objection)


def final_validation(trainer: Trainer, module: FinetuneModule, data: SFTDataModule) -> float | None:
    """Loss per supervised token on the validation rows; None when the data set has none."""
    loader = data.val_dataloader()
    if not loader:
        return None
    trainer.limit_val_batches = 1.0
    (metrics,) = trainer.validate(module, dataloaders=loader, verbose=False)
    return metrics["validation_loss"]


def show_result(result: dict[str, Any], run_dir: Path) -> None:
    table = Table(show_header=False, title=f"{result['status']}: {os.path.relpath(run_dir)}")
    names = ("steps", "train_loss", "validation_loss", "trainable_parameters", "total_parameters")
    for name in (*names, "tokens_per_second", "peak_memory_gib", "seconds"):
        value = result.get(name)
        text = "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
        table.add_row(name.replace("_", " "), text)
    Console().print(table)
