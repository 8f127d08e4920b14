"""The changes of the base in an adapter folder of HF PEFT beside the adapters: rows of embeddings, biases, embeddings.

Changed weights that train here are the adapter's own tensors. The others are frozen weights of the base that take the
values of the file, and that are kept with the model so that they go along when it is saved or merged.
"""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_peft.adapters.base import Adapter
from lightning_peft.adapters.ends import UNTIED, ends, is_tied, untie
from lightning_peft.adapters.inject import adapters
from lightning_peft.adapters.merge import GIVEN, Given
from lightning_peft.checkpoint.resume import assign
from lightning_peft.quantization.linear import CodedWeight

logger = logging.getLogger(__name__)

ROWS = ".token_adapter.trainable_tokens_delta"
"""End of the name of the rows (n, dim) that `trainable_token_indices` trained of a weight: values, not changes."""
LORA_BIAS = ".lora_B.bias"
"""End of the name of the tensor that `lora_bias` adds to the output of B, before the scaling, (out,)."""


class BaseChangeError(ValueError):
    """A change of the base that this model has no place for."""


def given_by(
    model: nn.Module, words: Mapping[str, Any], tensors: dict[str, Tensor], trained: Iterable[str]
) -> dict[str, Given]:
    """Take what changes weights of the base out of `tensors`, by our names; return the changes by the weight's name.

    A weight in `trained`, which the run trains, gets its changed value in `tensors` instead. Raises BaseChangeError.
    """
    found = _rows(model, words, tensors) | _biases(model, tensors)
    for name in found.keys() & set(trained):
        own = whole(model.get_parameter(name)).float()
        before = tensors.get(name, own)
        tensors[name] = found.pop(name).change(before.float().to(own.device))
    return found


def apply_given(model: nn.Module, changes: Mapping[str, Given]) -> None:
    """Change the model's weights, and keep the changes for whoever saves or merges the model.

    A changed weight has storage of its own from then on: a teacher may stand around the same tensors, and keeps its
    own.
    """
    for name, given in changes.items():
        parameter = model.get_parameter(name)
        if not isinstance(parameter, DTensor):
            parameter.data = parameter.data.clone()
        assign(parameter, given.change(whole(parameter).detach().float()).to(parameter.dtype))
    setattr(model, GIVEN, dict(changes))
    if changes:
        logger.info("%d tensors of the base come with the adapter: %s", len(changes), ", ".join(sorted(changes)[:3]))


def given_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what goes into the file of an adapter that began with such changes, by our names."""
    tensors: dict[str, Tensor] = {}
    for name, given in getattr(model, GIVEN, {}).items():
        stored, tensor = given.stored or (name, model.get_parameter(name))
        tensors[stored] = tensor
    return tensors


def write_given_words(model: nn.Module) -> dict[str, Any]:
    """Return HF's words for what `given_tensors` adds to a file."""
    given: dict[str, Given] = getattr(model, GIVEN, {})
    words: dict[str, Any] = {}
    if rows := {name.removesuffix(".weight"): list(one.rows) for name, one in given.items() if one.rows}:
        words["trainable_token_indices"] = rows
    if any(one.stored is not None and one.stored[0].endswith(LORA_BIAS) for one in given.values()):
        words["lora_bias"] = True
    if any(one.stored is None and name.endswith(".bias") for name, one in given.items()):
        words["bias"] = "lora_only"
    return words


def whole(parameter: Tensor) -> Tensor:
    """Return a parameter whole where it is sharded; every rank must call it."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _rows(model: nn.Module, words: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Given]:
    found: dict[str, Given] = {}
    rows = {name.removesuffix(ROWS): tensors.pop(name) for name in list(tensors) if name.endswith(ROWS)}
    numbers = {name: _numbers(words, name) for name in rows}
    for name, values in rows.items():
        weight = dict(model.named_parameters(remove_duplicate=False)).get(f"{name}.weight")
        count = 0 if weight is None or values.ndim != 2 or weight.shape[1:] != values.shape[1:] else len(weight)
        if not count or len(numbers[name]) != len(values) or not all(0 <= n < count for n in numbers[name]):
            raise BaseChangeError(
                f"trainable_token_indices: {name} has {tuple(values.shape)} values for {len(numbers[name])} rows, "
                f"which do not fit this model's weight of {None if weight is None else tuple(weight.shape)}"
            )
    embedding = head = ""
    if rows and (is_tied(model) or hasattr(model, UNTIED)):
        both_ends = ends(model)
        embedding, head = (next(name for name, module in model.named_modules() if module is end) for end in both_ends)
    if rows and is_tied(model):
        both = embedding in rows and head in rows
        is_same = both and numbers[embedding] == numbers[head] and torch.equal(rows[embedding], rows[head])
        if is_same:
            del rows[head]
        elif head in rows:
            untie(model)
    for name, values in rows.items():
        index = torch.tensor(numbers[name])

        def change(weight: Tensor, index: Tensor = index, values: Tensor = values) -> Tensor:
            return weight.index_copy(0, index.to(weight.device), values.to(weight))

        found[f"{name}.weight"] = Given(change, stored=(name + ROWS, values), rows=tuple(numbers[name]))
        inner = f"{head}.base_layer"
        is_shared = name == embedding and hasattr(model, UNTIED) and not rows.keys() & {head, inner}
        if is_shared and isinstance(model.get_submodule(head), Adapter):
            # The base has one weight: HF trains its rows below the head's adapter too.
            found[f"{inner}.weight"] = Given(change, stored=(name + ROWS, values))
    return found


def _numbers(words: Mapping[str, Any], name: str) -> list[int]:
    """Return the rows of the layer `name`, by the end of its name where the words say it of several."""
    wanted = words.get("trainable_token_indices") or []
    if isinstance(wanted, Mapping):
        wanted = next((rows for key, rows in wanted.items() if f".{name}".endswith(f".{key}")), [])
    return list(wanted)


@torch.no_grad()
def _biases(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Given]:
    """Return the changes of `lora_bias`: y = W x + b + s (B A x + b'), so that b becomes b + s b'.

    A layer without a bias gets one of zeros.
    """
    found: dict[str, Given] = {}
    layers = dict(adapters(model))
    for stored in [name for name in tensors if name.endswith(LORA_BIAS)]:
        name = stored.removesuffix(LORA_BIAS)
        added, layer = tensors.pop(stored), layers.get(name)
        base: Any = getattr(layer, "base_layer", None)
        lora_B: Any = getattr(layer, "lora_B", None)
        if not isinstance(lora_B, nn.Linear) or added.shape != (lora_B.out_features,) or not hasattr(base, "bias"):
            raise BaseChangeError(f"lora_bias: {name} has a bias of {tuple(added.shape)}, for which there is no place")
        assert layer is not None
        scaling: Any = layer.scaling
        is_new = base.bias is None
        if is_new:
            dtype = base.dtype if isinstance(base, CodedWeight) else base.weight.dtype
            zeros = torch.zeros(added.shape, dtype=dtype, device=lora_B.weight.device)
            base.bias = nn.Parameter(zeros, requires_grad=False)

        def change(bias: Tensor, added: Tensor = added, scaling: float = scaling) -> Tensor:
            return bias + scaling * added.to(bias)

        found[f"{name}.base_layer.bias"] = Given(change, is_new, (stored, added))
    return found
