"""The door for methods, initialisations, objectives, sources, tasks and optimisers of one's own.

A module that adds rows to our tables, as in `METHODS["mine"] = Method(...)`, is imported before options are read:
by name with `imports=[package.module]`, or for an installed package by an entry point of the group GROUP.
"""

import importlib
import importlib.metadata
import logging
import re
import sys
import sysconfig
import traceback
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

logger = logging.getLogger(__name__)

GROUP = "lightning_peft.plugins"
"""Entry points of installed packages; each names a module, or an object in one, whose import adds its rows."""
OWN_FILES = "own_files"
"""Folder of a run with files of the user's own that it began with: YAML that its command named, modules it imported."""
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


def import_modules(names: Sequence[str], kept: Path | None = None) -> None:
    """Import modules by name, each once a process. Raises PluginError with the error of a module.

    `kept` is a folder that `keep_modules` has filled: a module that is nowhere else is imported from there.
    """
    for name in map(str, names):
        if not all(part.isidentifier() for part in name.split(".")) or name.endswith(".py"):
            found = Path(name).name.removesuffix(".py").lstrip(".")
            example = f", as in imports=[{found}]" if found.isidentifier() else ""
            raise PluginError(
                f"imports={name}: must be a module by its dotted name{example}, from the working folder or PYTHONPATH"
            )
        top = name.partition(".")[0]
        if kept is not None and (kept / top).is_dir() | (kept / f"{top}.py").is_file() and find_spec(top) is None:
            logger.info("imports=%s: not found here, so as it was when the run began, from %s", name, kept)
            sys.path.append(str(kept))
        try:
            importlib.import_module(name)
            _imported.append(name)
        except ModuleNotFoundError as error:
            if error.name != name and not name.startswith(f"{error.name}."):
                raise PluginError(f"imports={name}: it imports {error.name}, which is not installed") from error
            raise PluginError(
                f"imports={name}: no module of that name in the working folder ({Path.cwd()}) or on PYTHONPATH; start "
                "where it lies, or name its folder in PYTHONPATH"
            ) from error
        except Exception as error:
            raise PluginError(f"imports={name}: {_last(error)}") from error


def keep_modules(names: Sequence[str], folder: Path) -> None:
    """Copy the source of imported modules that no package brought into a folder, from which others can import them.

    A package is copied with all its modules.
    """
    installed = {Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "platstdlib", "purelib", "platlib")}
    for name in names:
        top = name.partition(".")[0]
        file = getattr(sys.modules.get(top), "__file__", None) or getattr(sys.modules.get(name), "__file__", None)
        if file is None or folder in Path(file).parents or installed & set(Path(file).resolve().parents):
            continue
        is_package, place = Path(file).name == "__init__.py", Path(file).parent
        if is_package:
            files = {path.relative_to(place.parent): path for path in place.rglob("*.py")}
        else:
            files = {Path(*name.split(".")).with_suffix(".py"): Path(file)}
        for inside, path in files.items():
            (folder / inside).parent.mkdir(parents=True, exist_ok=True)
            (folder / inside).write_bytes(path.read_bytes())


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
