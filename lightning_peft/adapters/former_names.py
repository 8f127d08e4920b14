"""Names that layers had in earlier versions of transformers, which adapter folders of that time still have."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace

from torch import nn

from lightning_peft.adapters.base import AdapterConfig

logger = logging.getLogger(__name__)


def present_name(model: nn.Module) -> Callable[[str], str]:
    """Return a function that renames a layer or tensor as transformers renames a checkpoint's; names of today stay."""
    # This imports models of transformers, which a start that trains nothing does without.
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    if not isinstance(model, PreTrainedModel):
        return lambda name: name
    renamings = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
    modules = {name for name, _ in model.named_modules()}

    def rename(name: str) -> str:
        new = name
        for step in renamings:
            new = step.rename_source_key(new)[0]
        return new if is_part(new, modules) and not is_part(name, modules) else name

    return rename


def is_part(name: str, modules: Iterable[str]) -> bool:
    """Return whether a dotted name is a module's, or a tensor's of a module or of an adapter around it."""
    parts = name.split(".")
    return any(".".join(parts[:count]) in modules for count in range(len(parts), max(len(parts) - 3, 1), -1))


def with_present_names(model: nn.Module, config: AdapterConfig) -> AdapterConfig:
    """Return the config with full names of layers as the model has them today."""
    if isinstance(config.target_modules, str) or not any("." in str(name) for name in config.target_modules or []):
        return config
    rename = present_name(model)
    targets = [rename(str(name)) for name in config.target_modules]
    if targets == list(map(str, config.target_modules)):
        return config
    logger.info(
        "layers are named as in an earlier version of transformers: %s is %s", config.target_modules[0], targets[0]
    )
    return replace(
        config,
        target_modules=targets,
        trainable_modules=[rename(name) for name in config.trainable_modules],
        rank_pattern={rename(name): rank for name, rank in config.rank_pattern.items()},
        alpha_pattern={rename(name): alpha for name, alpha in config.alpha_pattern.items()},
    )
