"""The content of adapter_config.json: written for a model with adapters, and read as a config of ours."""

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_peft.adapters.base import Adapter, AdapterConfig
from lightning_peft.adapters.bias import Bias
from lightning_peft.adapters.inject import SHARED, adapters
from lightning_peft.adapters.layer_names import block_depth
from lightning_peft.adapters.lora import LoRAExperts
from lightning_peft.adapters.method import PeftSpelling, Shapes
from lightning_peft.adapters.registry import METHODS
from lightning_peft.checkpoint.lineage import Lineage, read_lineage
from lightning_peft.checkpoint.peft_base import ROWS, write_given_words
from lightning_peft.checkpoint.peft_experts import matrix_shapes, named_by_parameter, write_parameter_words
from lightning_peft.checkpoint.peft_methods import (
    KEEPS_BASE,
    READ_HERE,
    REWRITES_BASE,
    SWITCHED_OFF,
    WITHOUT_EFFECT,
    spelling,
    spellings,
)
from lightning_peft.checkpoint.peft_parameters import pattern_name
from lightning_peft.models.reward_head import reward_head

logger = logging.getLogger(__name__)

CONFIG_NAME = "adapter_config.json"
PREFIX = "base_model.model."
OF_REWARDS = "SEQ_CLS"
"""HF's task of a model that gives each text one number."""

Words = Mapping[str, Any]
"""HF's configuration: word -> value."""


class AdapterFileError(ValueError):
    """An adapter folder that cannot be read, or that does not fit the model."""


def write_words(
    model: nn.Module, config: AdapterConfig, tensors: Mapping[str, Tensor], base_model_name: str | None
) -> dict[str, Any]:
    """Return HF's words for the adapters in `model`, whose tensors in the file are `tensors`."""
    row = spelling(config.method)
    layers = dict(adapters(model))
    words: dict[str, Any] = {
        "peft_type": row.peft_type,
        "task_type": OF_REWARDS if reward_head(model) is not None else "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "target_modules": target_words(model, [name for name, layer in layers.items() if not _is_stack(layer)]),
        "modules_to_save": _modules_to_save(model, layers, config.trained_biases) or None,
        **row.constants,
        **row.flags,
        **{theirs: _plain(getattr(config, ours)) for ours, theirs in row.options.items()},
    }
    if any(isinstance(m := layer.base_layer, Conv1D) or getattr(m, "transposed", False) for layer in layers.values()):
        words["fan_in_fan_out"] = True
    shapes = layer_shapes(matrix_shapes(tensors), row)
    if row.rank_word is not None:
        _write_per_layer(words, row, row.rank_word, "rank_pattern", {name: shape[0] for name, shape in shapes.items()})
    if row.alpha_word is not None:
        alphas = {name: _alpha(_scaling_of(layers[name]), shape[0], words, row) for name, shape in shapes.items()}
        _write_per_layer(words, row, row.alpha_word, "alpha_pattern", alphas)
    words |= write_parameter_words(layers) | write_given_words(model)
    return words | (row.write_more(layers, words) if row.write_more is not None else {})


def _is_stack(layer: Adapter) -> bool:
    return isinstance(layer, LoRAExperts)


def _write_per_layer(
    words: dict[str, Any], row: PeftSpelling, word: str, pattern_word: str, values: Mapping[str, float]
) -> None:
    words[word], exceptions = _common(values)
    if pattern_word in row.patterns:
        words[pattern_word] = {_pattern_key(name, values): value for name, value in exceptions.items()}
    elif exceptions:
        logger.warning("HF PEFT has no %s for %s: lightning-peft reads this folder", pattern_word, row.peft_type)


def _scaling_of(layer: Any) -> float:
    return layer.scaling


def target_words(model: nn.Module, targets: list[str]) -> list[str] | str:
    """Return words that select the adapted layers and no others: last parts of names, else full names, else a regex."""
    inside = tuple(f"{name}." for name in targets)
    names = [name for name, _ in model.named_modules() if name and not name.startswith(inside)]
    for choice in ({name.rpartition(".")[2] for name in targets}, set(targets)):
        if {name for name in names if not choice.isdisjoint(_ends(name))} == set(targets):
            return sorted(choice)
    return "|".join(re.escape(name) for name in sorted(targets))


def _plain(value: Any) -> Any:
    return value.name if isinstance(value, Enum) else value


def _modules_to_save(model: nn.Module, layers: Mapping[str, Adapter], bias: Bias) -> list[str]:
    """Return the full names of the modules outside the adapters that train, biases of `bias=all` aside."""
    inside = (*(f"{name}." for name in layers), f"{SHARED}.")
    trained = [
        name
        for name, p in model.named_parameters(remove_duplicate=False)
        if p.requires_grad and not (bias is Bias.all and name.endswith(".bias"))
    ]
    holders = {name.rpartition(".")[0] for name in trained if not name.startswith(inside)}
    # PEFT keeps what a named module holds: naming a part of one again would hide it from its own file.
    return sorted(name for name in holders if not any(name.startswith(f"{other}.") for other in holders))


def _pattern_key(name: str, names: Iterable[str]) -> str:
    """Return a key for one layer: HF matches it against the ends of names; `^` keeps it from matching a longer one."""
    return f"^{name}" if any(other.endswith(f".{name}") for other in names) else name


def _ends(name: str) -> list[str]:
    """Return the ends of a dotted name: a.b.c, b.c and c of a.b.c."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _common(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the most frequent value, and the entries that differ from it."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {name: value for name, value in values.items() if value != common}


def read_words(folder: Path) -> dict[str, Any]:
    """Return the content of adapter_config.json. Raises AdapterFileError."""
    path = folder / CONFIG_NAME
    if not folder.is_dir():
        raise AdapterFileError(f"{folder}: no such adapter folder")
    if not path.is_file():
        raise AdapterFileError(f"{folder}: not an adapter folder, it has no {CONFIG_NAME}")
    try:
        words = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise AdapterFileError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(words, dict) or "peft_type" not in words:
        raise AdapterFileError(f"{path}: names no peft_type, so it is not the config of an adapter")
    return words


def gives_rewards(folder: Path) -> bool:
    """Return whether the model of an adapter folder scores texts, by a head that the folder has, and writes none."""
    return read_words(folder).get("task_type") == OF_REWARDS


def read_config(folder: Path, words: Words, shapes: Shapes) -> AdapterConfig:
    """Return our config for HF's words and the shapes of the tensors in the file. Raises AdapterFileError."""
    method = method_of(folder, words)
    row = spelling(method)
    _check_words(folder, words, row)
    shapes, unknown = named_by_parameter(words, shapes, PREFIX)
    if unknown:
        raise AdapterFileError(
            f"{folder}: target_parameters names {unknown}; of parameters only stacked experts and weights of layers "
            "are read: merge it by HF PEFT's merge_and_unload"
        )
    # A layer that AdaLoRA has cut to rank 0 is the base's.
    layers = {name: shape for name, shape in layer_shapes(shapes, row).items() if shape[0] > 0}
    if row.tensors and not layers:
        raise AdapterFileError(f"{folder}: holds no tensor of method {method}, such as {row.tensors[0]}")
    options = {
        ours: _typed(METHODS[method].config, ours, words[theirs])
        for ours, theirs in row.options.items()
        if theirs in words
    }
    if row.rank_word is not None:
        options["rank"], options["rank_pattern"] = _common({name: shape[0] for name, shape in layers.items()})
    if row.alpha_word is not None:
        options["alpha"], options["alpha_pattern"] = _common(
            {
                name: _alpha(stored_scaling(words, row, name, shape[0]), shape[0], words, row)
                for name, shape in layers.items()
            }
        )
    if row.read_more is not None:
        options |= row.read_more(words, layers)
    has_bias = any(name.endswith(".bias") and not name.endswith(".lora_B.bias") for name in shapes)
    if options.get("bias", Bias.none) is not Bias.none and not has_bias:
        logger.info("%s: bias=%s, and the model had none to train", folder, options["bias"].name)
        options["bias"] = Bias.none
    # HF trains the rows of two tied layers together.
    parts = {name.rpartition(".lora_")[0] or name for name in shapes if not name.endswith(ROWS)}
    outside_blocks = [name for name in parts if name.startswith(PREFIX) and block_depth(f"{name}.") is None]
    return METHODS[method].config(
        # PEFT changes one of two tied layers alone; our own folders name both, or neither, or say that they untie.
        untie_embeddings=bool(outside_blocks) and _unties(read_lineage(folder)),
        target_modules=sorted(layers) or _targets_by_words(words),
        trainable_modules=_trained_modules(words, row, shapes),
        **options,
    )


def _unties(lineage: Lineage | None) -> bool:
    """Return whether a folder's adapter gives the ends weights of their own; HF PEFT's has no lineage, and does."""
    return lineage is None or bool((lineage.config.get("adapter") or {}).get("untie_embeddings"))


def _typed(config: type[AdapterConfig], option: str, value: Any) -> Any:
    """Return what `_plain` made of an option's value as the option's type, which its default has."""
    default = getattr(config, option, None)
    return type(default)[value] if isinstance(default, Enum) else value


def method_of(folder: Path, words: Words) -> str:
    """Return the method an adapter folder holds; the lineage tells methods apart that HF writes alike."""
    fitting = [
        method
        for method, row in spellings().items()
        if row.peft_type == words["peft_type"]
        and all(bool(words.get(k)) == v for k, v in row.flags.items())
        and (folder / row.shared_file).exists()
    ]
    if not fitting:
        known = ", ".join(sorted({row.peft_type for row in spellings().values()}))
        raise AdapterFileError(f"{folder}: peft_type={words['peft_type']} is not supported; these are: {known}")
    lineage = read_lineage(folder)
    return lineage.method if lineage is not None and lineage.method in fitting else fitting[0]


def _check_words(folder: Path, words: Words, row: PeftSpelling) -> None:
    """Raise for HF features we do not have, log the words we do not know."""
    for word, off in SWITCHED_OFF.items():
        if word in words and words[word] not in off:
            raise AdapterFileError(f"{folder}: uses {word}={words[word]!r}, a feature of HF PEFT not supported here")
    _check_values(folder, words, row)
    init = str(words.get("init_lora_weights", True)).lower()
    if init not in (*KEEPS_BASE, *REWRITES_BASE):
        raise AdapterFileError(
            f"{folder}: init_lora_weights={init!r} changed the base weights, so the file alone is not enough; "
            "save it in HF PEFT with path_initial_model_for_weight_conversion"
        )
    known = {*SWITCHED_OFF, *WITHOUT_EFFECT, *READ_HERE, *row.flags, *row.constants, *row.options.values()}
    unknown = sorted(words.keys() - known - {row.rank_word, row.alpha_word})
    if unknown:
        logger.warning("%s: ignored, not known: %s", folder / CONFIG_NAME, ", ".join(unknown))


def _check_values(folder: Path, words: Words, row: PeftSpelling) -> None:
    """Raise AdapterFileError for a number or a pattern that is none, which only a file written by hand has."""
    path = folder / CONFIG_NAME
    named = (row.alpha_word, row.rank_word, row.options.get("dropout"))
    numbers: dict[str, Any] = {word: words[word] for word in named if word is not None and word in words}
    for word in row.patterns:  # AdaLoRA has lists in its rank_pattern
        patterns = words.get(word) or {}
        if not isinstance(patterns, dict):
            raise AdapterFileError(f"{path}: {word}={patterns!r} must be an object of names and numbers")
        numbers |= {f"{word}[{key!r}]": value for key, value in patterns.items()}
        for key in patterns:
            try:
                re.compile(key)
            except re.error as error:
                raise AdapterFileError(f"{path}: {word} names {key!r}, not a regular expression: {error}") from None
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise AdapterFileError(f"{path}: {name}={value!r} must be a number")
        if not value > 0 and name.startswith((str(row.alpha_word), "alpha_pattern")):
            raise AdapterFileError(
                f"{path}: {name}={value!r} must be above 0: give the factors the sign, or leave the layer out"
            )
    if (bias := words.get("bias", "none")) not in Bias.__members__:
        raise AdapterFileError(f"{path}: bias={bias!r} must be one of {', '.join(Bias.__members__)}")


def layer_shapes(shapes: Shapes, row: PeftSpelling) -> dict[str, tuple[int, ...]]:
    """Return the shape of each adapted layer's first tensor, whose dimension 0 is the rank."""
    found: dict[str, tuple[int, ...]] = {}
    named = [(name, shape) for name, shape in shapes.items() if name.startswith(PREFIX)]
    for ending in (f".{tensor}" for tensor in row.tensors):
        for name, shape in named:
            if name.endswith(ending):
                found.setdefault(name[len(PREFIX) : -len(ending)], shape)
    return found


def _targets_by_words(words: Words) -> list[str]:
    targets = words.get("target_modules") or []
    return [f"re:{targets}"] if isinstance(targets, str) else list(targets)


def stored_scaling(words: Words, row: PeftSpelling, name: str, rank: int) -> float:
    """Return the scaling of one layer by HF's rules: the first key of alpha_pattern that matches its name's end counts.

    A method with an offset keeps dividing by its first rank when ranks are cut.
    """
    assert row.alpha_word is not None and row.rank_word is not None
    alpha = words.get(row.alpha_word, 8)
    if patterns := words.get("alpha_pattern"):
        known_as = pattern_name(words, name)
        alpha = next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", known_as)), alpha)
    if row.rank_offset:
        rank = words.get(row.rank_word, rank)
    return alpha / _divisor(rank, words, row)


def _alpha(scaling: float, rank: int, words: Words, row: PeftSpelling) -> float:
    """Return the alpha that gives this scaling at this rank."""
    alpha = scaling * _divisor(rank, words, row)
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 * abs(alpha) else alpha


def _divisor(rank: int, words: Words, row: PeftSpelling) -> float:
    return rank**0.5 if words.get("use_rslora") else rank + row.rank_offset


def _trained_modules(words: Words, row: PeftSpelling, names: Iterable[str]) -> list[str]:
    """Return the full names of the modules that the file holds whole because they were trained."""
    endings = tuple(f".{ending}" for ending in row.tensors)
    holders = {
        name.removeprefix(PREFIX).rpartition(".")[0]
        for name in names
        if name.startswith(PREFIX) and not name.endswith(endings)
    }
    saved = words.get("modules_to_save") or []
    return sorted(m for m in holders if any(m.endswith(s) or f".{s}." in f".{m}." for s in saved))
