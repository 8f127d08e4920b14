"""`lightning-peft schema [FILE]`: a JSON schema of a training's YAML file, for editors that complete and check it."""

import json
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from lightning_peft.checkpoint.atomic import write_text
from lightning_peft.command_configs.of_runs import SubmitSweepConfig
from lightning_peft.help import GROUPS, TRAINER, every_option
from lightning_peft.options import Option, options_of, shown
from lightning_peft.own_file import SOURCES_KEY
from lightning_peft.schemas import CONF_DIR
from lightning_peft.slips import NAMED
from lightning_peft.words import OWN_FOLDER

TAKES_OTHERS = ("model", "data", "rank", "target_modules")
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
    """Return the schema: groups by name, sections with their keys, types, choices and docstrings.

    A key is known in its section and by its whole name; another one is an error, except where anything may be added.
    """
    properties: dict[str, Any] = {}
    options = [*every_option(), *options_of(SubmitSweepConfig)]
    for option in options:
        section, _, name = option.key.rpartition(".")
        target = properties
        for part in section.split(".") if section else []:
            target = target.setdefault(part, closed()).setdefault("properties", {})
        target.setdefault(name, described(option))
    properties["trainer"] = {
        "type": "object",
        "properties": {key.partition(".")[2]: {"description": text} for key, text in TRAINER.items()},
    }
    for group, text in GROUPS.items():
        folder = CONF_DIR / group
        names = sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.glob("**/*.yaml"))
        choice: dict[str, Any] = {"description": text, "enum": names}
        if group in TAKES_OTHERS:
            choice = {"description": text, "anyOf": [{"enum": names}, {"type": ["string", "integer", "array"]}]}
        if group == "cluster":
            choice = {"description": text, "enum": [*names, "local"]}  # of a sweep
        if group == "logger":
            named = {"type": "array", "items": {"enum": names}}
            choice = {"description": text, "anyOf": [{"enum": names}, named, {"type": "object"}]}
        keys = properties.get(group, {})
        properties[group] = {"description": text, "anyOf": [choice, keys]} if "properties" in keys else choice
    properties |= {option.key: described(option) for option in reversed(options) if "." in option.key}
    properties |= {OWN_FOLDER: {"description": "Folder of one's own options."}, "defaults": {"type": "array"}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lightning-peft train FILE.yaml",
        "properties": properties,
        "patternProperties": {f"{NAMED.pattern}|^hydra": {}},
    } | closed()


def closed() -> dict[str, Any]:
    """Return the schema of an object without keys of other names."""
    return {"type": "object", "additionalProperties": False}


TYPES = {
    str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null", list: "array", dict: "object",
}  # fmt: skip


def described(option: Option) -> dict[str, Any]:
    """Return the schema of one key: its docstring, default, and type or choices."""
    found: dict[str, Any] = {"description": option.doc, "default": plain(option)}
    if option.choices:
        return found | {"enum": [*option.choices, *([None] if type(None) in get_args(option.kind) else [])]}
    kinds = [option.kind] if get_origin(option.kind) not in (Union, UnionType) else list(get_args(option.kind))
    types = [TYPES[kind] for part in kinds if (kind := get_origin(part) or part) in TYPES]
    if option.key == SOURCES_KEY:  # with a name each, or without
        types.append("array")
    if option.key == "imports":  # of one module
        types.append("string")
    if "number" in types and "string" not in types:  # 2e-4, which is text to many readers of YAML
        return found | {"type": [*types, "string"], "pattern": r"^[-+]?[\d._]+([eE][-+]?\d+)?$"}
    return found | ({"type": types} if types and Any not in kinds else {})


def plain(option: Option) -> Any:
    """Return the default as JSON has it."""
    value = option.default
    if isinstance(value, list):
        return [shown(part) for part in value]
    if isinstance(value, str | int | float | dict) or value is None:
        return value
    return value.name if isinstance(value, Enum) else option.shown_default
