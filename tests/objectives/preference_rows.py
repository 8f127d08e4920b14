"""Preference rows of a few words, and the tiny model with adapters that are not zero."""

import json
import random
from pathlib import Path

import torch
from tiny_runs import tiny_config, tiny_parts

from lightning_peft.adapters.inject import adapters
from lightning_peft.data.datamodule import SFTDataModule
from lightning_peft.training.module import FinetuneModule

WORDS = "red green blue seven eight nine moon river stone cloud apple pear".split()


def words(draw: random.Random, least: int, most: int) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))


def pair_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    draw = random.Random(seed)
    return [
        {"prompt": words(draw, 2, 9), "chosen": words(draw, 1, 9), "rejected": words(draw, 2, 14)} for _ in range(count)
    ]


def labelled_rows(count: int, seed: int = 0) -> list[dict[str, str | bool]]:
    draw = random.Random(seed)
    return [
        {"prompt": words(draw, 2, 9), "completion": words(draw, 1, 9), "label": draw.random() < 0.5}
        for _ in range(count)
    ]


def written(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parts(folder: Path, objective: str, rows: list, *more: str) -> tuple[FinetuneModule, SFTDataModule]:
    """Return the module with its model, adapters drawn at random, and its data set up."""
    path = written(folder / "rows.jsonl", rows)
    config = tiny_config(
        folder / "run", f"objective={objective}", "data=jsonl", f"data.train_path={path}", "data.max_length=160",
        "data.validation_fraction=0", "data.cache_dir=null", *more,
    )  # fmt: skip
    module, data = tiny_parts(config)
    module.objective_config = config.objective
    data.setup()
    module.configure_model()
    draw_adapters(module)
    return module, data


def draw_adapters(module: FinetuneModule) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, adapter in adapters(module.model):
            for parameter in adapter.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
