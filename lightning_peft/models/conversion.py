"""Which tensors of a checkpoint make which parameters, by transformers' rules of conversion."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key


class Fusion(NamedTuple):
    """A rule that makes one or more parameters of several tensors."""

    name: str
    """The first of the parameters."""
    rule: WeightConverter
    members: list[tuple[str, str]]
    """Key of each tensor and the pattern of the rule that it falls under, in the order of the experts."""

    def run(self, model: PreTrainedModel, read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield the parameters by name, made of what `read` gives for each key."""
        rule = deepcopy(self.rule)
        for key, pattern in self.members:
            # A callable is read when the rule runs.
            rule.add_tensor(self.name, key, pattern, partial(read, key))  # type: ignore[arg-type]
        for target, value in rule.convert(self.name, model=model, config=model.config).items():
            yield target, value[0] if isinstance(value, list) else value


def plan_loading(
    model: PreTrainedModel, keys: list[str], targets: set[str]
) -> tuple[dict[str, str], dict[str, Fusion], list[str]]:
    """Parameter name to checkpoint key; the rules that fuse or split tensors, by one of the parameters they make; the
    keys that have no place."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    exists = dict.fromkeys(targets, True)
    direct: dict[str, str] = {}
    fused: dict[str, Fusion] = {}
    unexpected: list[str] = []
    # The order of the keys is the order of the experts in a fused parameter.
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, exists)
        if name not in targets and key in targets:
            name, pattern = key, None
        if name not in targets:
            unexpected.append(key)
        elif pattern is None:
            direct[name] = key
        else:
            fused.setdefault(name, Fusion(name, by_pattern[pattern], [])).members.append((key, pattern))
    return direct, fused, unexpected
