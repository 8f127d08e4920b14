"""Biases for layers of a base that has none, where its architecture has options for them."""

from collections.abc import Collection, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from lightning_peft.adapters.base import NotMergeableError
from lightning_peft.quantization.linear import CodedWeight


def bias_options(model: Any, wanted: Collection[str]) -> dict[str, set[str]]:
    """Return the options of a model's config that give it the biases `wanted`, each with all those that it adds.

    Raises NotMergeableError where the architecture has no place for one of them.
    """
    before = biases_of(model, {})
    off = [option for option, value in vars(model.config.get_text_config()).items() if value is False]
    added = {option: biases_of(model, {option: True}) - before for option in off if option.endswith("bias")}
    found = {option: names for option, names in added.items() if not names.isdisjoint(wanted)}
    if lacking := sorted({*wanted} - before.union(*found.values())):
        raise NotMergeableError(
            f"the adapter has {lacking[0]}, and {type(model).__name__} has no such weight: serve it unmerged"
        )
    return found


def biases_of(model: Any, options: Mapping[str, bool]) -> set[str]:
    """Return the names of the biases that a model of this architecture has with these options."""
    config = deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for option, value in options.items():
        setattr(config.get_text_config(), option, value)
    with torch.device("meta"):
        return {name for name, _ in type(model)._from_config(config).named_parameters() if name.endswith(".bias")}


def add_biases(model: Any, options: Mapping[str, Collection[str]]) -> None:
    """Switch options on, and give the model the biases that they add: zeros where it has none."""
    for option, names in options.items():
        setattr(model.config.get_text_config(), option, True)
        for name in names:
            layer: Any = model.get_submodule(name.removesuffix(".bias"))
            if layer.bias is None:
                dtype = layer.dtype if isinstance(layer, CodedWeight) else layer.weight.dtype
                zeros = torch.zeros(layer.out_features, dtype=dtype, device=next(layer.parameters()).device)
                layer.bias = nn.Parameter(zeros, requires_grad=False)
