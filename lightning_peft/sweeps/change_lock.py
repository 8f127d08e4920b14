"""The lock under which a sweep's manifest is changed, also on file systems that have no locks."""

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from lightning_peft.cluster.process import Process, this_process

logger = logging.getLogger(__name__)

CHANGE_LOCK = ".lock"
"""Name of the file that is locked while the manifest is changed; it holds the process that changed it last."""
WAIT_IS_SAID_AFTER = 5.0
"""Seconds of waiting for somebody else's change until the log says whose."""
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""Errors that `flock` raises on a file system without locks, as Lustre is where it was mounted so."""
SECONDS_TO_CHANGE = 600.0
"""Time above that of any change of a sweep, with a cluster that does not answer."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep everybody else from changing the sweep, inside the block. The lock goes with the process that holds it.

    On a file system without locks a file that only one can make stands for it. One that is left behind counts no longer
    once its process, of this machine, is gone, or it has been waited for for SECONDS_TO_CHANGE.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / CHANGE_LOCK).open("a+", encoding="utf-8") as file:
        waiting = threading.Timer(WAIT_IS_SAID_AFTER, say_who_changes, (folder,))
        waiting.daemon = True
        waiting.start()
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        else:
            waiting.cancel()
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield
            return
        finally:
            waiting.cancel()
    made = folder / ".changing"
    take_place(made)
    try:
        made.write_text(json.dumps(asdict(this_process())), encoding="utf-8")
        yield
    finally:
        made.unlink(missing_ok=True)


def take_place(made: Path) -> None:
    """Make a file that only one process can make, once it is gone or its maker is."""
    first, began = None, time.monotonic()
    since, is_said = began, False
    while True:
        try:
            made.open("x", encoding="utf-8").close()
            return
        except FileExistsError:
            with suppress(FileNotFoundError):
                found = made.stat()
                seen = found.st_ino, found.st_mtime_ns
                first, since = (first, since) if seen == first else (seen, time.monotonic())
                if is_of_dead(made) or time.monotonic() - since > SECONDS_TO_CHANGE:
                    remove_the_same(made, found.st_ino)
                elif not is_said and time.monotonic() - began > WAIT_IS_SAID_AFTER:
                    is_said = True
                    logger.warning(
                        "%s: waiting for its process (%s), %d s at most; remove the file if that is no more",
                        made, made.read_text(encoding="utf-8", errors="replace").strip() or "not named",
                        SECONDS_TO_CHANGE,
                    )  # fmt: skip
            time.sleep(0.1)


def remove_the_same(made: Path, inode: int) -> None:
    """Remove a file that was left behind, and not one that another process has made in its place meanwhile."""
    aside = made.with_name(f"{made.name}.{socket.gethostname()}.{os.getpid()}")
    made.rename(aside)
    if aside.stat().st_ino == inode:
        logger.warning("%s: left behind by a process that was killed; removed", made)
        aside.unlink()
    else:
        aside.rename(made)


def is_of_dead(made: Path) -> bool:
    """Return whether a file names a process of this machine that is gone."""
    try:
        return not Process(**json.loads(made.read_text(encoding="utf-8"))).is_alive
    except (ValueError, TypeError):  # it is being written
        return False


def say_who_changes(folder: Path) -> None:
    with suppress(OSError):
        who = (folder / CHANGE_LOCK).read_text(encoding="utf-8", errors="replace") or "another process"
        logger.warning("%s: waiting for %s, which changes the sweep", folder, who)


def may_be_changed(folder: Path) -> bool:
    """Return whether this user may write the sweep's file; somebody else's sweep can be looked at all the same."""
    places = [place for place in (folder, folder / CHANGE_LOCK) if place.exists()]
    return all(os.access(place, os.W_OK, effective_ids=True) for place in places)
