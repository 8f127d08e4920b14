"""The door for methods, initialisations, objectives, sources, tasks and optimisers of one's own.

A module that adds rows to our tables, as in `METHODS["mine"] = Method(...)`, is imported before options are read:
by name with `imports=[package.module]`, or for an installed package by an entry point of the group GROUP.
"""

import contextlib
import importlib
import importlib.metadata
import io
import logging
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

GROUP = "lightning_peft.plugins"
"""Entry points of installed packages; each names a module, or an object in one, whose import adds its rows."""
OWN_FILES = "own_files"
"""Folder of a run with files of the user's own that it began with: YAML that its command named, modules it imported."""
WORD = re.compile(r"^\+{0,2}imports=\[?([^\]]*)\]?$")
ROW_NAME = re.compile(r"[A-Za-z]\w*")
"""Names that the command line takes without quotes."""
PRINTED = 200
"""Characters shown of what a module prints."""

logger = logging.getLogger(__name__)

_imported: list[str] = []
"""Modules that `imports` or an entry point named."""


class PluginError(ValueError):
    """A module that is to be imported and cannot be."""


@dataclass(frozen=True, eq=False)
class OpenTable:
    """A table that takes rows from outside the package."""

    name: str
    """The table's name in Python, for messages."""
    rows: dict[str, Any]
    row: type


@cache
def import_plugins(tables: tuple[OpenTable, ...]) -> None:
    """Import what installed packages announce, once a process. Raises PluginError."""
    for entry in importlib.metadata.entry_points(group=GROUP):
        label = f"plug-in {entry.name} ({entry.value})"
        try:
            with _guarded(label, tables):
                entry.load()
        except Exception as error:
            if isinstance(error, PluginError):
                raise
            raise PluginError(f"{label} cannot be imported: {_last(error)}") from error
        _imported.append(entry.module)


def import_modules(names: Sequence[str], tables: tuple[OpenTable, ...], kept: Path | None = None) -> None:
    """Import modules by name, each once a process.

    Raises PluginError with the error of a module, and for one that ends the program, takes the name of a row that is
    there already, or adds what is no row. Prints of a module go to the log, as stdout is the command's own. `kept`
    is a folder that `keep_modules` has filled: a module that is nowhere else is imported from there.
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
            with _guarded(f"imports={name}", tables):
                _check_is_meant(name, importlib.import_module(name))
        except ModuleNotFoundError as error:
            if error.name != name and not name.startswith(f"{error.name}."):
                raise PluginError(f"imports={name}: it imports {error.name}, which is not installed") from error
            raise PluginError(
                f"imports={name}: no module of that name in the working folder ({Path.cwd()}) or on PYTHONPATH; start "
                "where it lies, or name its folder in PYTHONPATH"
            ) from error
        except PluginError:
            raise
        except Exception as error:
            raise PluginError(f"imports={name}: {_last(error)}") from error
        _imported.append(name)


def _check_is_meant(name: str, module: ModuleType) -> None:
    """Raise PluginError where the working folder has a file of that name and Python took another module."""
    here = Path(*name.split(".")).with_suffix(".py")
    path = getattr(module, "__file__", None)
    if here.is_file() and (path is None or not here.samefile(path)):
        raise PluginError(
            f"imports={name}: is {path or 'a part of Python'}, which comes before {here.resolve()}; rename the file"
        )


@contextlib.contextmanager
def _guarded(label: str, tables: Sequence[OpenTable]) -> Iterator[None]:
    """Hold an import to what it may do: add rows of new names, and neither end the program nor print to stdout."""
    before = [dict(table.rows) for table in tables]
    loaded = set(sys.modules)
    printed, complained = io.StringIO(), io.StringIO()
    try:
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complained):
                yield
        except SystemExit as error:
            complained = io.StringIO()  # the usage of a script that read our words as its own
            raise PluginError(
                f"{label}: ends the program while it is imported (sys.exit({error.code!r})); put what a script runs "
                'below `if __name__ == "__main__":`'
            ) from error
        for table, rows in zip(tables, before, strict=True):
            _check_rows(label, table, rows)
    except BaseException:
        for table, rows in zip(tables, before, strict=True):
            table.rows.clear()
            table.rows.update(rows)
        for name in set(sys.modules) - loaded:
            if not name.startswith("lightning_peft."):
                del sys.modules[name]  # a second try is to say the same
        raise
    finally:
        sys.stderr.write(complained.getvalue())
    if text := " ".join(printed.getvalue().split()):
        cut = text if len(text) <= PRINTED else f"{text[:PRINTED]} ..."
        logger.warning("%s: prints while it is imported: %s", label, cut)


def _check_rows(label: str, table: OpenTable, before: dict[str, Any]) -> None:
    """Raise PluginError for a row of before that is another now or gone, and for a new one that is no row."""
    for name, row in before.items():
        if table.rows.get(name) is not row:
            does = "replaces" if name in table.rows else "removes"
            raise PluginError(
                f"{label}: {does} {table.name}[{name!r}], which runs and adapters mean by that name; give the row of "
                "your own another name"
            )
    for name in table.rows.keys() - before.keys():
        if not isinstance(table.rows[name], table.row):
            got = type(table.rows[name]).__name__
            raise PluginError(f"{label}: {table.name}[{name!r}]={got}: must be {_article(table.row.__name__)}")
        if not ROW_NAME.fullmatch(name):
            raise PluginError(f"{label}: {table.name}[{name!r}]: a name is letters, digits and _, a letter first")
        if (own := getattr(table.rows[name], "name", name)) != name:
            raise PluginError(f"{label}: {table.name}[{name!r}]: the row is named {own!r}; give both one name")


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'AEIO' else 'a'} {noun}"


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


def imported_by_words(words: Sequence[str], tables: tuple[OpenTable, ...]) -> list[str]:
    """Import what the word imports=[a,b] or imports=a names, and return the words with that as a list."""
    written = []
    for word in words:
        if (found := WORD.match(word)) is not None:
            names = [name.strip().strip("'\"") for name in found.group(1).split(",") if name.strip()]
            import_modules(names, tables)
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
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg} ({error.filename}, line {error.lineno})"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())} ({frame.filename}, line {frame.lineno})"
