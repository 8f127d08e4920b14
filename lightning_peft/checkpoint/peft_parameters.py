"""Layers whose weight an adapter of HF PEFT names in `target_parameters`, which are read as adapters of the layers.

Such a weight gets the factors that its layer would get, under the same names. HF takes its rows for the outputs, so the
factors of an embedding and of a Conv1D, whose rows are their inputs, are the other way round.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_peft.adapters.inject import adapters
from lightning_peft.quantization.weights import is_transposed

WEIGHT = "weight"


def is_weight(parameter: str) -> bool:
    """Return whether an entry of `target_parameters` names the weight of layers."""
    return parameter.rpartition(".")[2] == WEIGHT


def pattern_name(words: Mapping[str, Any], layer: str) -> str:
    """Return the name by which HF looks a layer up in its patterns: its weight's where the words name that."""
    weight = f"{layer}.{WEIGHT}"
    wanted = [name for name in words.get("target_parameters") or [] if is_weight(name)]
    return weight if any(f".{weight}".endswith(f".{name}") for name in wanted) else layer


def layers_from_peft(
    model: nn.Module, words: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str
) -> dict[str, Tensor]:
    """Return the tensors of a file with those of weights by the names, and in the layout, of their layers."""
    found = dict(tensors)
    for name, layer in adapters(model):
        is_embedding = isinstance(layer.base_layer, nn.Embedding)
        keys = [f"{prefix}{name}.lora_{factor}.weight" for factor in "AB"]
        is_swapped = is_embedding or is_transposed(layer.base_layer)
        if not is_swapped or pattern_name(words, name) == name or not found.keys() >= set(keys):
            continue
        A, B = (found.pop(key) for key in keys)
        new = [f"{prefix}{name}.lora_embedding_{factor}" for factor in "AB"] if is_embedding else keys
        found |= {new[0]: B.t().contiguous(), new[1]: A.t().contiguous()}
    return found
