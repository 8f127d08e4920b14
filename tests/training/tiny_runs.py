"""Small real runs for the tests: the tiny model on generated text-to-SQL rows."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from lightning_peft.compose import compose_config
from lightning_peft.config import TrainConfig
from lightning_peft.data.datamodule import SFTDataModule
from lightning_peft.models.loading import load_tokenizer
from lightning_peft.training.module import FinetuneModule
from lightning_peft.training.precision import ComputePrecision

TINY = [
    "model=tiny", "data.max_rows=24", "data.max_validation_rows=8", "data.micro_batch_size=1", "logger=csv",
    "trainer.precision=32-true", "trainer.accelerator=cpu", "optimizer.lr=0.01", "validation.samples=0",
]  # fmt: skip
"""Answers that are written at validations take longer than the rest of such a run."""


def tiny_config(run_dir: Path, *overrides: str) -> TrainConfig:
    return compose_config("train", [*TINY, f"run_dir={run_dir}", *overrides])


def tiny_parts(config: TrainConfig) -> tuple[FinetuneModule, SFTDataModule]:
    tokenizer = load_tokenizer(config.model)
    accumulate = config.trainer["accumulate_grad_batches"]
    data = SFTDataModule(config.data, tokenizer, config.seed, accumulate_grad_batches=accumulate)
    module = FinetuneModule(
        config.model, replace(config.adapter), config.optimizer, config.schedule, config.quantization, seed=config.seed
    )
    return module, data


def plain_trainer(**options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        plugins=[ComputePrecision("32-true")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        **options,
    )
