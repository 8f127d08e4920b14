"""The meaning of every option: the docstrings below the fields of our config classes, with types and defaults."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, get_args, get_type_hints


@dataclass(frozen=True)
class Option:
    """One key of the command line."""

    key: str
    """The key as typed, for example data.max_length."""
    kind: Any
    """Its type."""
    default: Any
    doc: str
    """The docstring below the field, on one line."""

    @property
    def choices(self) -> list[str]:
        """Return the names of an enumeration's members; empty for other types."""
        kinds = [self.kind, *get_args(self.kind)]
        return [member.name for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum) for member in kind]

    @property
    def shown_default(self) -> str:
        """Return the default as it would be typed."""
        return "???" if self.default is MISSING or self.default == "???" else shown(self.default)


def shown(value: Any) -> str:
    """Return a value as it would be typed."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, list):
        return "[" + ",".join(shown(part) for part in value) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@cache
def field_docs(config: type) -> dict[str, str]:
    """Return the docstring below each field of a dataclass, its bases' included, each on one line."""
    docs: dict[str, str] = {}
    for kind in reversed(config.__mro__):
        if not is_dataclass(kind):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        assert isinstance(tree, ast.ClassDef)
        for statement, below in zip(tree.body, [*tree.body[1:], None], strict=True):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            is_doc = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            if is_doc and isinstance(below.value.value, str):  # type: ignore[union-attr]
                docs[statement.target.id] = " ".join(below.value.value.split())  # type: ignore[union-attr]
    return docs


def options_of(config: type, prefix: str = "") -> Iterator[Option]:
    """Yield every option of a config class and of the classes inside it, by the key that is typed."""
    docs, hints = field_docs(config), get_type_hints(config)
    for entry in fields(config):
        kind = hints[entry.name]
        inner = next((part for part in (kind, *get_args(kind)) if is_dataclass(part)), None)
        if isinstance(inner, type):
            yield from options_of(inner, f"{prefix}{entry.name}.")
            continue
        default = entry.default
        if entry.default_factory is not MISSING:
            default = entry.default_factory()
        yield Option(f"{prefix}{entry.name}", kind, default, docs.get(entry.name, ""))
