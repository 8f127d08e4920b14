"""The tensors of a checkpoint that make each parameter, by transformers' rules of conversion."""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from lightning_peft.models.multimodal import names_left


class _AsPublished:
    """A model for rules that ask for a parameter's shape: a stack that is kept in codes has the one it had before."""

    def __init__(self, model: PreTrainedModel, shapes: Mapping[str, torch.Size]):
        self.model, self.shapes = model, shapes

    def get_parameter(self, name: str) -> Tensor:
        try:
            return self.model.get_parameter(name)
        except AttributeError:
            return torch.empty(self.shapes[name], device="meta")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


class Fusion(NamedTuple):
    """A rule that makes one or more parameters of several tensors."""

    name: str
    """The first of the parameters."""
    rule: WeightConverter
    members: list[tuple[str, str]]
    """Key of each tensor and the pattern of the rule that it falls under, in the order of the experts."""

    def run(
        self, model: PreTrainedModel, read: Callable[[str], Tensor], shapes: Mapping[str, torch.Size] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the parameters by name, made of what `read` gives for each key.

        `shapes` are those of the parameters before any became codes.
        """
        rule = deepcopy(self.rule)
        for key, pattern in self.members:
            # A callable is read when the rule runs.
            rule.add_tensor(self.name, key, pattern, partial(read, key))  # type: ignore[arg-type]
        published: Any = _AsPublished(model, shapes or {})
        for target, value in rule.convert(self.name, model=published, config=model.config).items():
            yield target, value[0] if isinstance(value, list) else value


class LoadingPlan(NamedTuple):
    """The place of each key of a checkpoint."""

    direct: dict[str, str]
    """Parameter name: key."""
    fused: dict[str, Fusion]
    """The rules that fuse or split tensors, by one of the parameters they make."""
    unexpected: list[str]
    """Keys that have no place."""
    left: list[str]
    """Keys of parts that are left on disk."""


def fuses_weights(model: PreTrainedModel) -> bool:
    """Return whether transformers fuses or splits tensors of such a model's checkpoints, as it stacks experts."""
    return any(isinstance(rule, WeightConverter) for rule in get_model_conversion_mapping(model))


def plan_loading(model: PreTrainedModel, keys: list[str], targets: set[str]) -> LoadingPlan:
    """Find the parameters that a checkpoint's keys become, by transformers' conversion rules."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    elsewhere = names_left(model)
    exists = dict.fromkeys(targets | elsewhere, True)
    plan = LoadingPlan({}, {}, [], [])
    # The order of the keys is the order of the experts in a fused parameter.
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, exists)
        if name not in exists and key in exists:
            name, pattern = key, None
        if name in elsewhere:
            plan.left.append(key)
        elif name not in targets:
            plan.unexpected.append(key)
        elif pattern is None:
            plan.direct[name] = key
        else:
            plan.fused.setdefault(name, Fusion(name, by_pattern[pattern], [])).members.append((key, pattern))
    return plan
