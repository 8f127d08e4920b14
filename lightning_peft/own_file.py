"""A YAML file of one's own as words of the command line."""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import yaml

from lightning_peft.data.config import named_sources
from lightning_peft.other_tools import ours, what_instead
from lightning_peft.slips import OPEN

SOURCES_KEY = "data.sources"
"""The key of a mixture, which may be a list too."""
EMPTY = ("callbacks", "claim")
"""Parts that hold nothing unless they are given: a file that leaves one empty says no more than that."""


class EachKeyOnce(yaml.SafeLoader):
    """YAML in which a key that a mapping has twice is an error: yaml keeps the last and drops the others."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        merge = "tag:yaml.org,2002:merge"  # <<: *anchor, which may be there again and is overridden on purpose
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != merge]
        if twice := next((key for place, key in enumerate(keys) if key in keys[:place]), None):
            raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} twice", node.start_mark)
        return dict(super().construct_mapping(node, deep))


def words_of_file(path: Path) -> list[str]:
    """Return the words that a YAML file of groups and keys stands for, outer groups before the keys inside them.

    A recipe's list of defaults is read as groups.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        there = next((other for other in map(path.with_suffix, (".yaml", ".yml")) if other.is_file()), None)
        hint = f"did you mean {there}?" if there else f"`lightning-peft init {path}` writes one to start from"
        raise ValueError(f"{path}: no such file; {hint}") from error
    except IsADirectoryError as error:
        raise ValueError(f"{path}: is a folder; give a YAML file, or rows as data={path}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not YAML in UTF-8 ({error})") from error
    return words_of_text(text, path)


def words_of_text(text: str, path: Path) -> list[str]:
    """Return the words of a file from its content; `path` is the name in errors."""
    try:
        content = yaml.load(text, EachKeyOnce)
    except yaml.YAMLError as error:
        is_pasted = "\u00a0" in text
        reason = "it holds no-break spaces, as of a web page; put plain ones" if is_pasted else what_is_wrong(error)
        raise ValueError(f"{path}: not YAML ({reason})") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: must hold keys and values, as in `method: qlora`")
    if content.keys() >= {"adapter", "optimizer", "run_dir"} and "_target_" in (content.get("trainer") or ()):
        raise ValueError(f"{path}: is the whole config of a run; config_path={path} starts from it")
    groups = _groups_of_recipe(content.pop("defaults", []), path)
    return words_of_keys(groups | content, path)


def words_of_keys(content: dict[str, Any], name: Path | str) -> list[str]:
    """Return the words of nested groups and keys, outer groups first; `name` is what they are called in errors."""
    words = list(flat_words(content, "", name))
    counts = Counter(word.partition("=")[0] for word in words)
    if twice := next((key for key, count in counts.items() if count > 1), None):
        raise ValueError(f"{name}: has {twice} twice, as {twice}: and inside {twice.partition('.')[0]}:")
    return [word for word in words if "." not in word.partition("=")[0]] + [
        word for word in words if "." in word.partition("=")[0]
    ]


def refuse_file_of_another_tool(path: Path, words: Sequence[str], known: Collection[str]) -> None:
    """Raise ValueError for a file of which several keys are another tool's, with ours for each: in one line, at once.

    `words` are the file's own, and `known` the groups and sections that there are. A single one is left to the command,
    which knows what letters are near. Keys of Hydra's are for its sweeper and launcher.
    """
    foreign = [
        (key, value)
        for key, _, value in (word.partition("=") for word in words)
        if section_of(key) not in {*known, "hydra"}
    ]
    found = [(*meaning_of(key), value) for key, value in foreign]
    if len(foreign) < 2 or not any(meant or instead for _, meant, instead, _ in found):
        return
    said: dict[str, dict[str, None]] = {"write": {}, "leave out": {}, "": {}, "not known:": {}}
    for name, meant, instead, value in found:
        is_off = value in ("null", "''") or value == "false" and (meant is None or "=" in meant)
        if is_off or instead is not None and instead.startswith("leave it out"):
            said["leave out"][name] = None
        elif meant is not None:
            said["write"][f"{name} as {meant}"] = None
        elif instead is not None:
            said[""][f"{name}: {instead}"] = None
        else:
            said["not known:"][name] = None
    parts = [f"{what} {', '.join(names)}".strip() for what, names in said.items() if names]
    raise ValueError(f"{path}: {len(found)} of its keys are another tool's; {'; '.join(parts)}")


def meaning_of(key: str) -> tuple[str, str | None, str | None]:
    """Return a key of another tool, or the section it stands in, with our word for it and with what to do instead."""
    section = section_of(key)
    for name in (key, section):
        if (instead := what_instead(name)) is not None:
            return name, None, instead
    meant = ours(key)
    return key, meant if meant is not None else ours(section), what_instead(key.rpartition(".")[2])


def section_of(key: str) -> str:
    return re.split("[./]", key.lstrip("+~"))[0]


def what_is_wrong(error: yaml.YAMLError) -> str:
    """Return PyYAML's finding, with its place in the file, as one line."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    problem = str(getattr(error, "problem", None))
    if "'\\t'" in problem:
        problem = "a tab, where YAML takes spaces only"
    elif "mapping values are not allowed" in problem:
        problem = "a second colon, or a line too far to the right; put text that holds a colon in quotes"
    elif "cannot start any token" in problem:
        problem += "; put such text in quotes"
    context = getattr(error, "context", None)
    return (
        f"line {mark.line + 1}: {f'{context}: ' if context and 'scanning for the next' not in context else ''}{problem}"
    )


def _groups_of_recipe(defaults: Any, path: Path) -> dict[str, Any]:
    """Return group -> option of a list such as [{override /method: qlora}]."""
    groups: dict[str, Any] = {}
    for entry in defaults if isinstance(defaults, list) else [defaults]:
        if entry == "_self_":
            continue
        named = list(entry.items()) if isinstance(entry, dict) else []
        if len(named) != 1 or not (group := re.fullmatch(r"(?:override )?/?([\w/]+)", str(named[0][0]))):
            raise ValueError(f"{path}: defaults: {entry!r} must be of the form `override /group: option`")
        groups[group.group(1)] = named[0][1]
    return groups


def flat_words(content: dict[Any, Any], prefix: str, path: Path | str) -> Iterator[str]:
    """Yield nested keys and values as words of the command line."""
    for key, value in content.items():
        if not isinstance(key, str):
            raise ValueError(f"{path}: {prefix}{key}: a key must be text")
        if isinstance(value, dict) and not value and f"{prefix}{key}" not in EMPTY and not OPEN.match(f"{prefix}{key}"):
            raise ValueError(f"{path}: {prefix}{key}: has nothing inside; leave it out, or give it keys")
        if isinstance(value, set):
            raise ValueError(f"{path}: {prefix}{key}: must be keys with values, or a list")
        if f"{prefix}{key}" == SOURCES_KEY and isinstance(value, list | tuple):
            value = named_sources(list(value))
        if isinstance(value, dict) and value:
            yield from flat_words(value, f"{prefix}{key}.", path)
        else:
            yield f"{prefix}{key}={typed_value(value)}"


def typed_value(value: Any) -> str:
    """Return a value of YAML, or of Python, in Hydra's grammar."""
    if hasattr(value, "tolist"):  # numbers and arrays of numpy
        value = value.tolist()
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, PathLike):
        value = str(value)
    if isinstance(value, list | tuple):
        return "[" + ",".join(typed_value(part) for part in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{typed_value(part)}" for key, part in value.items()) + "}"
    if isinstance(value, str) and not re.fullmatch(r"[\w./${}:-]+", value):
        return in_quotes(value)
    return str(value)


def in_quotes(text: str) -> str:
    """Return text in quotes of Hydra's grammar, in which a backslash is one unless a quote follows."""
    written = re.sub(r"(\\*)'", lambda found: found.group(1) * 2 + "\\'", text)
    return "'" + re.sub(r"(\\+)\Z", lambda found: found.group(1) * 2, written) + "'"
