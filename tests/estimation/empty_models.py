"""Objectives on the meta device, as `estimate` makes them, for the tests."""

import json
from pathlib import Path

import torch

from lightning_peft.command_configs.of_runs import EstimateConfig
from lightning_peft.commands.step_estimate import empty_objective, estimate_of
from lightning_peft.compose import compose_config
from lightning_peft.estimation.memory import Estimate
from lightning_peft.models.tiny import tiny_config
from lightning_peft.objectives.sft import SupervisedLoss

TINY = ["model=tiny", "data.micro_batch_size=2", "data.max_length=64", "trainer.precision=32-true", "hardware=cpu"]


def config_of(*overrides: str) -> EstimateConfig:
    return compose_config("estimate", [*TINY, *overrides])


def empty(*overrides: str, dtype: torch.dtype = torch.float32) -> SupervisedLoss:
    return empty_objective(config_of(*overrides), dtype)


def tiny_estimate(*overrides: str) -> Estimate:
    return estimate_of(config_of(*overrides))


def config_folder(folder: Path, **changes: int) -> Path:
    """Return a model folder that holds a config.json and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = tiny_config().to_dict() | {"architectures": ["LlamaForCausalLM"]} | changes
    (folder / "config.json").write_text(json.dumps(shape))
    return folder
