"""The door for methods, initialisations, objectives, sources, tasks and optimisers of one's own.

A module that adds rows to our tables, as in `METHODS["mine"] = Method(...)`, is imported before options are read:
by name with `imports=[package.module]`, or for an installed package by an entry point of the group GROUP.
"""

import importlib
import importlib.metadata
import re
import sys
import traceback
from collections.abc import Sequence
from functools import cache

GROUP = "lightning_peft.plugins"
"""Entry points of installed packages; each names a module, or an object in one, whose import adds its rows."""
WORD = re.compile(r"^\+{0,2}imports=\[?([^\]]*)\]?$")


_imported: list[str] = []
"""Modules that `imports` or an entry point named."""


class PluginError(ValueError):
    """A module that is to be imported and cannot be."""


@cache
def import_plugins() -> None:
    """Import what installed packages announce, once a process. Raises PluginError."""
    for entry in importlib.metadata.entry_points(group=GROUP):
        try:
            entry.load()
            _imported.append(entry.module)
        except Exception as error:
            raise PluginError(f"plug-in {entry.name} ({entry.value}) cannot be imported: {_last(error)}") from error


def import_modules(names: Sequence[str]) -> None:
    """Import modules by name, each once a process. Raises PluginError with the error of a module."""
    for name in names:
        try:
            importlib.import_module(name)
            _imported.append(name)
        except ModuleNotFoundError as error:
            if error.name != name and not name.startswith(f"{error.name}."):
                raise PluginError(f"imports={name}: it imports {error.name}, which is not installed") from error
            raise PluginError(
                f"imports={name}: no module of that name in the working folder or on PYTHONPATH"
            ) from error
        except Exception as error:
            raise PluginError(f"imports={name}: {_last(error)}") from error


def imported_by_words(words: Sequence[str]) -> list[str]:
    """Import what the word imports=[a,b] or imports=a names, and return the words with that as a list."""
    written = []
    for word in words:
        if (found := WORD.match(word)) is not None:
            names = [name.strip().strip("'\"") for name in found.group(1).split(",") if name.strip()]
            import_modules(names)
            word = f"imports=[{','.join(names)}]"
        written.append(word)
    return written


def is_of_plugin(filename: str) -> bool:
    """Return whether a source file is of a module that was imported here, or in its package."""
    for name in _imported:
        path = getattr(sys.modules[name], "__file__", None)
        if path is not None and (filename == path or path.endswith("__init__.py") and filename.startswith(path[:-11])):
            return True
    return False


def _last(error: Exception) -> str:
    """Return where an import failed and of what, in one line."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())} ({frame.filename}, line {frame.lineno})"
