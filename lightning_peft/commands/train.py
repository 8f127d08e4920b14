"""`lightning-peft train`: from a resolved config to an adapter, its metrics and its lineage in one run folder."""

import inspect
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import Logger, WandbLogger
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from lightning_peft.adapters.inject import describe_targets, inject_adapters, trainable_parameter_counts
from lightning_peft.adapters.registry import METHODS
from lightning_peft.adapters.targets import find_targets
from lightning_peft.checkpoint.atomic import atomic_folder
from lightning_peft.checkpoint.lineage import Lineage, installed_versions, write_lineage
from lightning_peft.checkpoint.merged import save_model
from lightning_peft.checkpoint.peft_format import CONFIG_NAME, save_adapter
from lightning_peft.checkpoint.resume import AtomicCheckpointIO, check_same_config, latest_checkpoint
from lightning_peft.config import TrainConfig, plain
from lightning_peft.data.audit import preview
from lightning_peft.data.datamodule import SFTDataModule
from lightning_peft.data.formats import read_rows
from lightning_peft.data.sources import load_rows
from lightning_peft.inference.load import MODEL_FOLDER
from lightning_peft.models.attention import supports_packing
from lightning_peft.models.loading import empty_model, load_tokenizer, model_context, model_name, source_fingerprint
from lightning_peft.training.callbacks.adapter_checkpoint import AdapterCheckpoint
from lightning_peft.training.callbacks.progress import PlainProgress
from lightning_peft.training.callbacks.samples import Samples
from lightning_peft.training.callbacks.step_metrics import StepMetrics, peak_memory_gib
from lightning_peft.training.module import FinetuneModule
from lightning_peft.training.precision import precision_plugin, resolve_precision, weight_dtype
from lightning_peft.training.strategies import build_strategy

logger = logging.getLogger(__name__)


def train(config: TrainConfig) -> dict[str, Any]:
    """Run a training to its end, or on from its last checkpoint. Returns what `result.json` holds.

    Raises ValueError, before a weight is read, for anything wrong with the config, the data or the run folder.
    """
    started = time.perf_counter()
    check_trainer_options(config.trainer)
    accelerator = resolve_accelerator(str(config.trainer.get("accelerator", "auto")))
    precision = resolve_precision(str(config.trainer.get("precision", "auto")), accelerator, trains_all(config))
    assert config.run_dir is not None, "the config composes a run_dir"
    run_dir = Path(config.run_dir)
    checkpoint = None if config.dry_run else find_checkpoint(config, run_dir)
    if checkpoint == FINISHED:
        logger.info("%s is finished: nothing left to do", run_dir)
        return json.loads((run_dir / "result.json").read_text())

    if config.adapter.init_from is not None and not (Path(config.adapter.init_from) / CONFIG_NAME).is_file():
        raise ValueError(f"adapter.init_from={config.adapter.init_from}: no adapter folder, it has no {CONFIG_NAME}")
    show_targets(config)
    tokenizer = load_tokenizer(config.model)
    accumulate = int(config.trainer.get("accumulate_grad_batches", 1))
    data = SFTDataModule(config.data, tokenizer, config.seed, model_context(config.model), accumulate)
    data.setup()
    if config.data.preview and data.example is not None:
        Console().print(preview(data.example, tokenizer))
    if config.dry_run:
        return {"status": "dry run"}

    run_dir.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(plain(config)), run_dir / "config.yaml")
    module = FinetuneModule(
        config.model, config.adapter, config.optimizer, config.schedule, config.quantization,
        config.activation_checkpointing, weight_dtype(precision, trains_all(config)), config.seed,
    )  # fmt: skip

    def save(module: LightningModule, folder: Path) -> None:
        if trains_all(config):
            with atomic_folder(folder.with_name(folder.name.replace("adapter", MODEL_FOLDER))) as partial:
                save_model(module.model, tokenizer, partial, module.model.dtype)  # type: ignore[arg-type, union-attr]
                write_lineage(lineage_of(config, data.fingerprint), partial)
            return
        save_adapter(
            module.model,  # type: ignore[arg-type]
            config.adapter,
            folder,
            model_name(config.model),
            lineage_of(config, data.fingerprint),
        )

    metrics = StepMetrics()
    conversations = read_rows(load_rows(config.data, "validation")[: config.validation.samples], config.data)
    callbacks: list[Callback] = [
        metrics,
        Samples(conversations, tokenizer, run_dir),
        AdapterCheckpoint(config.checkpoint, run_dir, save),
    ]
    trainer = build_trainer(config, accelerator, precision, callbacks, accumulate)
    result: dict[str, Any] = {"status": "failed"}
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
        if trainer.interrupted:
            raise KeyboardInterrupt
        result |= {
            "steps": trainer.global_step,
            "train_loss": metrics.last_loss,
            "tokens_per_second": metrics.tokens_per_second(),
        }
        save(module, run_dir / "adapter")
        result["validation_loss"] = final_validation(trainer, module, data)
        trainable, total = trainable_parameter_counts(module.model)
        result |= {"status": "finished", "metrics": {}, "trainable_parameters": trainable, "total_parameters": total}
    finally:
        result |= {
            "peak_memory_gib": peak_memory_gib(trainer.strategy.root_device),
            "seconds": time.perf_counter() - started,
            "versions": installed_versions(),
        }
        if trainer.is_global_zero:
            (run_dir / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    for run_logger in trainer.loggers:
        if isinstance(run_logger, WandbLogger):
            run_logger.experiment.finish()  # writes what it still holds; until then up to 15 s are in memory only
    if trainer.is_global_zero:
        show_result(result, run_dir)
    return result


FINISHED = "finished"


def trains_all(config: TrainConfig) -> bool:
    return not METHODS[config.adapter.method].layers


def resolve_accelerator(name: str) -> str:
    """cpu or cuda, from `trainer.accelerator`."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda", "gpu"):
        raise ValueError(f"trainer.accelerator={name!r}: must be auto, cpu or gpu")
    if name != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"trainer.accelerator={name}: this machine has no CUDA device; use cpu or auto")
    return "cpu" if name == "cpu" else "cuda"


def check_trainer_options(options: dict[str, Any]) -> None:
    known = set(inspect.signature(Trainer).parameters)
    for key in options:
        if key != "_target_" and key not in known:
            raise ValueError(f"trainer.{key}: lightning.pytorch.Trainer has no such argument")
    steps, epochs = options.get("max_steps", -1), options.get("max_epochs")
    if steps is not None and steps != -1 and steps < 1:
        raise ValueError(f"trainer.max_steps={steps}: must be at least 1, or -1 for no limit")
    if epochs is not None and epochs != -1 and epochs < 1:
        raise ValueError(f"trainer.max_epochs={epochs}: must be at least 1")
    if steps == -1 and epochs in (None, -1):
        raise ValueError("trainer.max_steps=-1 trainer.max_epochs=null: training would never end; give one of them")
    if (algorithm := options.get("gradient_clip_algorithm", "norm")) not in (None, "norm"):
        raise ValueError(f"trainer.gradient_clip_algorithm={algorithm!r}: only norm is supported")
    if (devices := options.get("devices", 1)) not in (1, "1", "auto"):
        raise ValueError(f"trainer.devices={devices}: strategy=single runs on one device")
    accumulate = options.get("accumulate_grad_batches", 1)
    if accumulate < 1:
        raise ValueError(f"trainer.accumulate_grad_batches={accumulate}: must be at least 1")


def find_checkpoint(config: TrainConfig, run_dir: Path) -> str | None:
    """What to resume from: a checkpoint's path, None for a fresh start, `FINISHED` where nothing is left to do."""
    if config.resume not in ("never", "auto"):
        path = Path(config.resume)
        if not path.is_file():
            raise ValueError(f"resume={config.resume}: no such checkpoint; use auto, never or a .ckpt file")
        check_saved_config(config, path.parent.parent)
        return str(path)
    used = (run_dir / "config.yaml").exists()
    if config.resume == "never":
        if used:
            raise ValueError(f"run_dir={run_dir} holds a run already: resume=auto continues it, or name another folder")
        return None
    if not used:
        return None
    check_saved_config(config, run_dir)
    result = run_dir / "result.json"
    if result.exists() and json.loads(result.read_text()).get("status") == "finished" and same_length(config, run_dir):
        return FINISHED
    found = latest_checkpoint(run_dir / "checkpoints")
    return str(found) if found else None


def check_saved_config(config: TrainConfig, run_dir: Path) -> None:
    path = run_dir / "config.yaml"
    if path.exists():
        saved = OmegaConf.to_container(OmegaConf.load(path))
        assert isinstance(saved, dict)
        check_same_config(without_run_keys(saved), without_run_keys(plain(config)))


def without_run_keys(config: dict[Any, Any]) -> dict[str, Any]:
    """The config less what may differ between the starts of one run."""
    return {str(key): value for key, value in config.items() if key not in ("resume", "dry_run", "run_dir", "logger")}


def same_length(config: TrainConfig, run_dir: Path) -> bool:
    saved = OmegaConf.load(run_dir / "config.yaml").trainer
    return all(saved.get(key) == config.trainer.get(key) for key in ("max_steps", "max_epochs"))


def show_targets(config: TrainConfig) -> None:
    """Find the target layers on an empty model, so that a wrong pattern costs no loading; print them on a dry run."""
    model = empty_model(config.model)
    method = METHODS[config.adapter.method]
    targets = find_targets(model, config.adapter, tuple(method.layers)) if method.layers else []
    if config.data.packing and not supports_packing(model):
        raise ValueError(
            f"data.packing=true: packed samples would see each other in {type(model).__name__}; use data.packing=false"
        )
    if config.dry_run:
        inject_adapters(model, config.adapter)
        Console().print(describe_targets(targets, model))


def lineage_of(config: TrainConfig, data_fingerprint: str) -> Lineage:
    return Lineage(
        base_fingerprint=source_fingerprint(config.model),
        base_name=model_name(config.model),
        method=config.adapter.method,
        quantization=config.quantization.kind.name,
        config=plain(config),
        data_fingerprint=data_fingerprint,
    )


def build_trainer(
    config: TrainConfig, accelerator: str, precision: str, callbacks: list[Callback], accumulate: int
) -> Trainer:
    loggers: list[Logger] = [instantiate(node) for node in config.logger.values()]
    options = dict(config.trainer)
    options.pop("precision", None)
    options["accelerator"] = "gpu" if accelerator == "cuda" else "cpu"
    if config.validation.every_n_steps is not None:
        options |= {
            "val_check_interval": config.validation.every_n_steps * accumulate,
            "check_val_every_n_epoch": None,
        }
    else:
        options["limit_val_batches"] = 0
    progress = RichProgressBar(leave=True) if Console().is_terminal else PlainProgress()
    return instantiate(
        options,
        _convert_="all",
        callbacks=[*callbacks, progress],
        logger=loggers,
        strategy=build_strategy(config.strategy, accelerator),
        plugins=[precision_plugin(precision, accelerator), AtomicCheckpointIO(config.checkpoint.keep_last)],
        default_root_dir=config.run_dir,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )


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
