"""Processes that outlive the one that started them, told apart from later ones with the same number."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path

LEAVE = "leave"
"""File in a run's folder that asks this run to save and leave, where others share its process."""


@dataclass(frozen=True)
class Process:
    """A process of one machine."""

    pid: int
    started: int
    """Clock ticks after boot; a pid is given out again, the pair is not."""
    host: str

    @property
    def is_here(self) -> bool:
        return self.host == socket.gethostname()

    @property
    def is_alive(self) -> bool:
        """Return whether the process lives; one of another machine is taken to live until someone says it is over."""
        return not self.is_here or start_ticks(self.pid) == self.started


def process(pid: int) -> Process:
    """Return the process that has the number now; call it while the process cannot have ended unseen."""
    ticks = start_ticks(pid)
    return Process(pid, 0 if ticks is None else ticks, socket.gethostname())


def this_process() -> Process:
    return process(os.getpid())


def start_ticks(pid: int) -> int | None:
    """Return when a process started; None when there is none, or only its exit status is left."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name in parentheses may hold anything, blanks and parentheses too.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])
