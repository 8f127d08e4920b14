"""Files and folders that are either the old one or the new one, whatever happens while they are written."""

import ctypes
import errno
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
DEVICES = "/dev"
"""The folder of devices, and of what this process has open."""


class SaveError(OSError):
    """Something could not be written; what stood there before still does."""


def partial_path(path: Path) -> Path:
    """Return where `path` is written before it is renamed.

    A leftover of a killed process is overwritten by the next one.
    """
    return path.with_name(f".{path.name}.partial")


@contextmanager
def atomic_file(path: Path, has_one_writer: bool = True) -> Iterator[Path]:
    """Return a path to write to, which becomes `path` when the block ends without an exception.

    Where several processes may write `path` at once, without `has_one_writer`, each has a path of its own, and the last
    to end counts. Raises SaveError on any OSError, a full disk among them.
    """
    partial = partial_path(path)
    if not has_one_writer:
        partial = partial.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
    with _save_errors(path, partial):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Return an empty folder to write to, which becomes `path` when the block ends without an exception.

    The umask says who may read the folder's files, whatever wrote them.
    Raises SaveError on any OSError, a full disk among them.
    """
    partial = partial_path(path)
    with _save_errors(path, partial):
        _remove(partial)
        partial.mkdir(parents=True)
        yield partial
        for child in partial.rglob("*"):
            if child.is_file():
                child.chmod(partial.stat().st_mode & 0o666)  # safetensors gives its files to the owner alone
            _sync(child)
        _sync(partial)
        _replace_folder(partial, path)
        _sync(path.parent)


def check_is_there(folder: Path) -> None:
    """Raise FileNotFoundError for a folder that was moved or removed: what is saved below it would make another."""
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))


def is_written_as_it_stands(path: Path) -> bool:
    """Return whether a path leads to a device or a pipe, in whose place no file is put."""
    return path.exists() and (not path.is_file() or path.is_relative_to(DEVICES))  # /dev/stdout may lead to a file


def check_can_write(path: Path) -> None:
    """Raise ValueError for a file that could not be written now, before what is to stand in it is computed."""
    place = path if is_written_as_it_stands(path) else path.resolve().parent
    if not os.access(place, os.W_OK, effective_ids=True):  # also where the file system is mounted read-only
        raise ValueError(f"{path}: cannot be written, as {place} is read-only here; give output= another place")


def write_text(path: Path, text: str) -> None:
    """Write a file that somebody asked for, whole or not at all, also behind a link; a device or pipe as it stands.

    Who may read a file that was there before may read the new one. Raises SaveError as `atomic_file` does, OSError with
    the file's name for what is no file.
    """
    if is_written_as_it_stands(path):
        with names_file(path):
            path.write_text(text, encoding="utf-8")
        return
    with atomic_file(path.resolve(), has_one_writer=False) as partial:
        partial.write_text(text, encoding="utf-8")
        if path.exists():
            partial.chmod(path.stat().st_mode & 0o777)


@contextmanager
def names_file(path: Path) -> Iterator[None]:
    """Have a failed file operation inside that names no file, as one on a full disk, name this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.strerror is not None:
            error.filename = str(path)
        raise


@contextmanager
def _save_errors(path: Path, partial: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        _remove(partial)
        if isinstance(error, SaveError):  # for a file in the folder
            error = error.__cause__ if isinstance(error.__cause__, OSError | SafetensorError) else error
        reason = getattr(error, "strerror", None) or str(error)
        raise SaveError(f"{path}: cannot be saved ({reason}); what was there before is unchanged") from error
    except BaseException:
        _remove(partial)
        raise


def _replace_folder(new: Path, path: Path) -> None:
    if not path.exists():
        os.rename(new, path)
        return
    if not _exchange(new, path):
        # File systems and kernels without an exchange take two renames: a crash between them leaves `.NAME.previous`.
        previous = path.with_name(f".{path.name}.previous")
        _remove(previous)
        os.rename(path, previous)
        os.rename(new, path)
        new = previous
    _remove(new)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two paths in one step (Linux's renameat2); False where that does not exist."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):  # what has failed before is said, and not this
        path.unlink()
