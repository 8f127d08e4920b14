"""A folder has one writer: a lock that ends with the process that holds it, on one node and over a shared file system.

Two things keep a second writer out. `flock` does on one node, and between nodes where the file system carries it over
(NFS, GPFS, Lustre with `flock`). Where it does not, the lock file's time stamp does: the holder renews it every few
seconds, and whoever finds a holder on another node watches the time stamp before taking over.
"""

import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from lightning_peft.checkpoint.atomic import names_file
from lightning_peft.sweeps.change_lock import NO_LOCKS

logger = logging.getLogger(__name__)

LOCK = ".writer"
"""Name of the lock file. It is removed when its holder is done; one that stays behind is of a killed process."""
BEAT_SECONDS = 3.0
"""Time between two renewals of the lock file's time stamp."""
WATCH_SECONDS = 4 * BEAT_SECONDS
"""Time for which the time stamp of a holder on another node is watched."""

_open_locks: set[int] = set()
"""File descriptors of held locks. A forked child closes them: else a DataLoader worker would hold its parent's lock."""
_made_here: set[Path] = set()
"""Folders that this process made for a run, removed again where nothing was written into them."""


class FolderInUse(ValueError):
    """Another process writes the folder."""


class FolderGone(ValueError):
    """The folder was moved or removed while this process wrote it."""


@dataclass(frozen=True)
class Holder:
    """The process that a lock file names."""

    pid: int
    host: str
    since: float
    """Seconds since the epoch."""
    job: str | None = None
    """SLURM's number of the job it runs in."""

    def __str__(self) -> str:
        job = f", SLURM job {self.job}," if self.job is not None else ""
        start = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host}{job} since {start}"


def _close_in_child() -> None:
    for descriptor in _open_locks:
        with suppress(OSError):
            os.close(descriptor)
    _open_locks.clear()


os.register_at_fork(after_in_child=_close_in_child)


def new_folder(path: Path) -> Path:
    """Make a folder of this name, or with -2, -3 ... behind the name where it is taken. No two callers get the same."""
    _make(path.parent)
    candidate, copies = path, 1
    while True:
        try:
            candidate.mkdir()
        except FileExistsError:
            copies += 1
            candidate = path.with_name(f"{path.name}-{copies}")
        else:
            _made_here.add(candidate.resolve())
            return candidate


@contextmanager
def only_writer(
    folder: Path, key: str = "run_dir", patience_seconds: float = 0.0, named: Path | None = None
) -> Iterator[None]:
    """Keep every other process that asks out of the block for the folder, which is made where it is missing.

    Raises FolderInUse, which names the holder, once `patience_seconds` have passed, and FolderGone for an OSError of
    the block where the folder is another by then; `key` is the option that named the folder, or `named` where that is
    another. A folder made for this block goes again when the block leaves it empty.
    """
    refuse_file(folder, key)
    _make(folder)
    file = _locked_file(folder, f"{key}={named or folder}", patience_seconds)
    _open_locks.add(file.fileno())
    taken = folder.stat()
    done = threading.Event()
    beats = threading.Thread(target=_beat, args=(folder / LOCK, done), daemon=True)
    try:
        with names_file(named or folder / LOCK):
            _write_holder(file)
        beats.start()
        yield
    except OSError as error:
        if not _is_gone(folder, taken):
            raise
        raise FolderGone(
            f"{key}={named or folder}: was moved or removed while this process wrote it ({error}); "
            "give the folder as it is called now"
        ) from error
    finally:
        done.set()
        if beats.is_alive():
            beats.join()
        if _is_of(file, folder / LOCK):  # in a folder that was made anew it is another process's
            with suppress(OSError):  # on a disk that is read-only by now it stays, and holds nobody off
                (folder / LOCK).unlink()
        _open_locks.discard(file.fileno())
        with suppress(OSError):  # a full disk says so a second time, and without the file's name
            file.close()
        remove_if_empty(folder)


@contextmanager
def only_maker(output: Path) -> Iterator[None]:
    """Keep every other process that asks from making `output`. Raises FolderInUse, which names the holder.

    The lock lies beside it: a folder that is made must not be there before.
    """
    beside = output.absolute().with_name(f".{output.name}.writer")
    with only_writer(beside, "output", named=output):
        yield
    with suppress(OSError):  # one that a killed process has left is not removed by itself
        beside.rmdir()


def refuse_file(folder: Path, key: str) -> None:
    """Raise ValueError where a folder would have to be made over or below a file; `key` is the option that names it."""
    found = next((path for path in (folder, *folder.parents) if os.path.lexists(path)), None)
    if found is not None and found.is_symlink() and not found.exists():
        raise ValueError(f"{key}={folder}: {found} is a link to {found.readlink()}, which is not there; name a folder")
    if found is not None and not found.is_dir():
        raise ValueError(f"{key}={folder}: {found} is a file; name a folder")


def remove_if_empty(folder: Path) -> None:
    """Remove a folder that this process made, and its parents likewise, where nothing is in them."""
    for path in (folder.resolve(), *folder.resolve().parents):
        if path not in _made_here:
            return
        try:
            path.rmdir()
        except OSError:  # it is not empty: it is a run's folder now
            return
        _made_here.discard(path)


def _make(folder: Path) -> None:
    missing = [path for path in (folder.resolve(), *folder.resolve().parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    _made_here.update(missing)


def _locked_file(folder: Path, word: str, patience_seconds: float) -> IO[str]:
    deadline = time.monotonic() + patience_seconds
    is_waiting = False
    while True:
        try:
            file = (folder / LOCK).open("a+", encoding="utf-8")
        except FileNotFoundError:  # the holder before has just removed the folder, as nothing was in it
            _make(folder)
            continue
        try:
            if _take(file, folder / LOCK):
                return file
            holder = _read_holder(file)
        except BaseException:
            file.close()
            raise
        file.close()
        if time.monotonic() >= deadline:
            raise FolderInUse(f"{word}: {holder or 'another process'} writes it: wait for it, or name another")
        if not is_waiting:
            logger.info("%s: waiting for %s, which still writes it", folder, holder or "another process")
            is_waiting = True
        time.sleep(0.5)


def _take(file: IO[str], path: Path) -> bool:
    """Lock the open file; return False where somebody holds it."""
    carries_locks = True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        carries_locks = False
        logger.warning("%s: this file system has no locks; a second writer is told by time stamps only", path.parent)
    if not _is_of(file, path):
        return _take_again(file)
    holder = _read_holder(file)
    if holder is None or (carries_locks and holder.host == socket.gethostname()):
        return True
    return not _is_beating(path)


def _is_gone(folder: Path, taken: os.stat_result) -> bool:
    """Return whether no folder, or another, is where that of `taken` was."""
    try:
        return not os.path.samestat(folder.stat(), taken)
    except OSError as error:  # a file server may be away for a while
        return isinstance(error, FileNotFoundError | NotADirectoryError)


def _is_of(file: IO[str], path: Path) -> bool:
    """Return whether an open file is still the one that the path leads to."""
    try:
        return os.fstat(file.fileno()).st_ino == path.stat().st_ino
    except OSError:
        return False


def _take_again(file: IO[str]) -> bool:
    """Let go and return False: the holder before removed the file after `open`, so that the next lock is a new file."""
    fcntl.flock(file, fcntl.LOCK_UN)
    return False


def _is_beating(path: Path) -> bool:
    """Return whether the holder, on another node, renews the time stamp.

    The age of the stamp says nothing: the clocks of two nodes may differ by any time, and one may be set meanwhile.
    """
    first = path.stat().st_mtime_ns
    logger.info("%s: looking for %.0f seconds whether its writer on another node is alive", path.parent, WATCH_SECONDS)
    end = time.monotonic() + WATCH_SECONDS
    while time.monotonic() < end:
        time.sleep(BEAT_SECONDS / 2)
        # The file is opened anew: NFS looks at the server's attributes then, and at its own copy otherwise.
        with path.open(encoding="utf-8") as file:
            if os.fstat(file.fileno()).st_mtime_ns != first:
                return True
    return False


def _beat(path: Path, done: threading.Event) -> None:
    while not done.wait(BEAT_SECONDS):
        with suppress(OSError):  # a file server may be away for a while; the lock itself stands
            os.utime(path)


def _write_holder(file: IO[str]) -> None:
    holder = Holder(os.getpid(), socket.gethostname(), time.time(), os.environ.get("SLURM_JOB_ID"))
    file.seek(0)
    file.truncate()
    json.dump(asdict(holder), file)
    file.flush()


def _read_holder(file: IO[str]) -> Holder | None:
    """Return the holder that the file names; None where it was not written yet."""
    file.seek(0)
    try:
        return Holder(**json.loads(file.read()))
    except (ValueError, TypeError):
        return None
