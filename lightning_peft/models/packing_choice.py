"""The decision whether a model's samples are packed: `data.packing` made concrete; and whether several runs' are."""

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lightning_peft.data.config import DataConfig
from lightning_peft.models.attention import supports_packing
from lightning_peft.models.rope import follows_length
from lightning_peft.models.source import VARLEN

logger = logging.getLogger(__name__)

OF_OTHER_HEADS = ("classifier_", "summary_")
"""Beginnings of a configuration's options that are for heads that no causal language model has."""


def packing_of(config: DataConfig, model: PreTrainedModel) -> bool:
    """Return whether rows hold several samples; a model on the meta device will do.

    `auto` packs where samples stay apart, and says so where they would not. Raises ValueError for true
    where they would not.
    """
    if follows_length(model.config, config.max_length):
        problem = "the longest of packed samples would set the rotary frequencies of all"
    elif not supports_packing(model):
        problem = f"packed samples would see each other in {type(model).__name__}"
    else:
        return bool(config.packing)
    if config.packing == "auto":
        logger.info("data.packing=false: %s, so rows are padded", problem)
        return False
    if config.packing:
        raise ValueError(f"data.packing=true: {problem}; use data.packing=auto")
    return False


def obstacle_to_one_row(model: PreTrainedModel, longest: int | None) -> str:
    """Return why samples of several runs cannot be one packed row of this model as it trains; empty where they can.

    `longest` are the tokens that a sample may have. A model on the meta device will do.
    """
    kind = model.config.model_type
    if model.config._attn_implementation != VARLEN or not supports_packing(model):
        return f"the samples of several trials in one row would see each other in models of type {kind}"
    if follows_length(model.config, longest):
        return "the longest sample of all trials would set the rotary frequencies of each"
    rates = random_rates(model.config.get_text_config().to_dict())
    rates = rates or {name: part.p for name, part in model.named_modules() if isinstance(part, nn.Dropout) and part.p}
    if rates:
        own = ", ".join(f"{name}={rate:g}" for name, rate in rates.items())
        return f"models of type {kind} draw random numbers ({own}), which would not be those of a trial alone"
    return ""


def random_rates(options: Mapping[str, Any]) -> dict[str, float]:
    """Return the options of a model's configuration, nested ones too, by which it drops or jitters as it trains."""
    found: dict[str, float] = {}
    for name, value in options.items():
        if isinstance(value, Mapping):
            found |= random_rates(value)
        elif type(value) in (int, float) and value and ("drop" in name or "jitter" in name):
            found[name] = value
    return {name: rate for name, rate in found.items() if not name.startswith(OF_OTHER_HEADS)}
