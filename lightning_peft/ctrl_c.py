"""Ctrl-C while the command imports: one line and status 130, where Python would show what it was at.

This module is imported before everything else, so it imports nothing that takes time.
"""

# `signal` wraps this module of C; `signal` itself takes milliseconds.
import _signal  # type: ignore[import-not-found]
import os
import sys
from types import FrameType

INTERRUPTED = 130
"""Exit status, as of any program: 128 and the signal's number."""


def leave_at_once(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


def is_command() -> bool:
    """Return whether this process was started as our command, and does not import the package for its own ends."""
    processes = sys.modules.get("multiprocessing.process")
    if processes is not None and processes.parent_process() is not None:
        return False  # a worker, which has its parent's name
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    is_module = name == "-m" and ("-m", "lightning_peft") in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
    return name == "lightning-peft" or is_module


def end_at_ctrl_c() -> None:
    """Let Ctrl-C end the process at once from here on, unless it is ignored, or somebody else heeds it."""
    if is_heeded_by(_signal.default_int_handler):
        _signal.signal(_signal.SIGINT, leave_at_once)


def raise_at_ctrl_c() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again from here on, so that what is begun can be put away."""
    if is_heeded_by(leave_at_once):
        _signal.signal(_signal.SIGINT, _signal.default_int_handler)


def is_heeded_by(handler: object) -> bool:
    return _signal.getsignal(_signal.SIGINT) is handler


def is_caused_by_ctrl_c(error: BaseException | None) -> bool:
    """Return whether an error came of a KeyboardInterrupt, as one in the middle of a class does."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


IS_COMMAND = is_command()
if IS_COMMAND:
    end_at_ctrl_c()
