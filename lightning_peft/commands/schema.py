"""`lightning-peft schema [FILE]`: a JSON schema of a training's YAML file, for editors that complete and check it."""

import json
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from lightning_peft.adapters.registry import METHODS
from lightning_peft.checkpoint.atomic import write_text
from lightning_peft.cluster.registry import CLUSTERS
from lightning_peft.config import TrainConfig
from lightning_peft.help import GROUPS, TRAINER
from lightning_peft.objectives.registry import OBJECTIVES
from lightning_peft.optim.optimizers import OPTIMIZERS
from lightning_peft.options import Option, options_of, shown
from lightning_peft.schemas import CONF_DIR

OPEN = ("model", "data", "rank", "target_modules")
"""Groups that take other words than the names of their options: paths, numbers, lists."""


def schema(words: list[str]) -> None:
    """Print the schema, or write it to a file."""
    if len(words) > 1 or any("=" in word for word in words):
        raise ValueError(f"schema: takes the name of a file at most, not {' '.join(words)}")
    text = json.dumps(schema_of_file(), indent=2) + "\n"
    if words:
        write_text(Path(words[0]), text)
        print(f"{words[0]}: name it in a file's first line, as in # yaml-language-server: $schema={words[0]}")
    else:
        print(text, end="")


def schema_of_file() -> dict[str, Any]:
    """Return the schema: groups by name, sections with their keys, types, choices and docstrings."""
    properties: dict[str, Any] = {}
    options = [*options_of(TrainConfig)]
    for method in METHODS.values():
        options += options_of(method.config, "adapter.")
    for optimizer in OPTIMIZERS.values():
        options += options_of(optimizer.config, "optimizer.")
    for objective in OBJECTIVES.values():
        options += options_of(objective.config, "objective.")
    for cluster in CLUSTERS.values():
        options += options_of(cluster.config, "cluster.")
    for option in options:
        section, _, name = option.key.rpartition(".")
        target = properties
        for part in section.split(".") if section else []:
            target = target.setdefault(part, {"type": "object", "properties": {}}).setdefault("properties", {})
        target.setdefault(name, described(option))
    properties["trainer"] = {
        "type": "object",
        "properties": {key.partition(".")[2]: {"description": text} for key, text in TRAINER.items()},
    }
    for group, text in GROUPS.items():
        folder = CONF_DIR / group
        names = sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.glob("**/*.yaml"))
        choice: dict[str, Any] = {"description": text, "enum": names}
        if group in OPEN:
            choice = {"description": text, "anyOf": [{"enum": names}, {"type": ["string", "integer", "array"]}]}
        keys = properties.get(group, {})
        properties[group] = {"description": text, "anyOf": [choice, keys]} if "properties" in keys else choice
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lightning-peft train FILE.yaml",
        "type": "object",
        "properties": properties,
    }


TYPES = {
    str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null", list: "array", dict: "object",
}  # fmt: skip


def described(option: Option) -> dict[str, Any]:
    """Return the schema of one key: its docstring, default, and type or choices."""
    found: dict[str, Any] = {"description": option.doc, "default": plain(option)}
    if option.choices:
        return found | {"enum": option.choices}
    kinds = [option.kind] if get_origin(option.kind) not in (Union, UnionType) else list(get_args(option.kind))
    types = [TYPES[kind] for part in kinds if (kind := get_origin(part) or part) in TYPES]
    return found | ({"type": types} if types else {})


def plain(option: Option) -> Any:
    """Return the default as JSON has it."""
    value = option.default
    if isinstance(value, list):
        return [shown(part) for part in value]
    if isinstance(value, str | int | float | dict) or value is None:
        return value
    return value.name if isinstance(value, Enum) else option.shown_default
