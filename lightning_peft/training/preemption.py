"""The one owner of SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C: what SLURM, torchrun or a person send to end a run.

- Before the first step the process leaves at once: nothing is lost.
- During training the step and a validation behind it are finished, a checkpoint is written, loggers are flushed and
  `result.json` says preempted, or interrupted after Ctrl-C.
- A second signal some seconds later, or a second Ctrl-C, makes the process leave at once; the last checkpoint stands.

The exit status is 75 (EX_TEMPFAIL of sysexits.h), which says: run the same command again, with the run_dir that the
last line names and resume=auto, and it ends as if nothing had been. After Ctrl-C it is 130, which no scheduler takes
for that. `trainer.max_time` ends a start in the same way: the run is paused, with status 75.
Only the standard library is imported here, so that the handlers stand before the slow imports.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

PREEMPTED = 75
"""Exit status of a run that was asked to leave and can be resumed."""
INTERRUPTED = 130
"""Exit status after Ctrl-C, as of any program: 128 and the signal's number."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that a scheduler sends."""
REPEAT_SECONDS = 5.0
"""A signal so soon after the first is the same request: SLURM signals a launcher and its ranks, and one forwards it."""
REPEAT_SECONDS_OF_CTRL_C = 1.0
"""The same for Ctrl-C, which reaches launcher and ranks at once; a person who presses again means it."""


class Preempted(SystemExit):
    """Raised on every rank once the checkpoint is written; ends the process with its exit status."""

    status = "preempted"
    exit_status = PREEMPTED

    def __init__(self) -> None:
        super().__init__(self.exit_status)


class Interrupted(Preempted):
    """Ctrl-C: saved, and not to be started again by a scheduler."""

    status = "interrupted"
    exit_status = INTERRUPTED


class Paused(Preempted):
    """`trainer.max_time` is over: saved, to be gone on with by the next start."""

    status = "paused"


AT_ONCE = "leaving at once; resume=auto goes on from the last checkpoint, or begins anew without one"
REASONS: tuple[type[Preempted], ...] = (Paused, Preempted, Interrupted)
"""Reasons to leave a run, the weightiest last: where ranks have different reasons it is the one of all."""


def exit_status_of(number: int) -> int:
    return INTERRUPTED if number == signal.SIGINT else PREEMPTED


def leave_at_once(number: int, frame: FrameType | None) -> None:
    """Handle a signal when there is nothing to save."""
    os.write(2, f"{signal.Signals(number).name}: {AT_ONCE}\n".encode())
    os._exit(exit_status_of(number))


def handled() -> tuple[signal.Signals, ...]:
    """Return the signals that mean something here: not Ctrl-C where a shell put this behind with & and ignores it."""
    is_ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    return SIGNALS if is_ignored else (*SIGNALS, signal.SIGINT)


@contextmanager
def nothing_to_lose() -> Iterator[None]:
    """Let a signal end the process at once while the block runs, and no `PreemptionSignals` is started in it."""
    previous: dict[signal.Signals, Any] = {number: signal.signal(number, leave_at_once) for number in handled()}
    try:
        yield
    except Preempted:
        # The status stands: launchers kill what has not left yet, and Python would take the handlers away at exit.
        previous = dict.fromkeys(previous, signal.SIG_IGN)
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class PreemptionSignals:
    """Remembers a signal until the next step boundary; the handler does nothing else.

    A save inside a handler meets whatever the step was doing: ranks then wait for each other in different collectives.
    """

    def __init__(self, max_seconds: float | None = None) -> None:
        """Take `max_seconds`, which is `trainer.max_time`, counted from `start`."""
        self.max_seconds = max_seconds
        self._received: signal.Signals | None = None
        self._received_at = 0.0
        self._started_at = time.monotonic()
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def received(self) -> signal.Signals | None:
        """Return the first signal that came; None before one has."""
        return self._received

    @property
    def reason(self) -> type[Preempted] | None:
        """Return why this rank is to leave; None where it is not."""
        if self.received is not None:
            return Interrupted if self.received == signal.SIGINT else Preempted
        is_over = self.max_seconds is not None and time.monotonic() - self._started_at >= self.max_seconds
        return Paused if is_over else None

    def start(self) -> None:
        self._started_at = time.monotonic()
        if threading.current_thread() is not threading.main_thread():
            logger.info("training outside the main thread: signals end it without a checkpoint")
            return
        self._previous = {number: signal.signal(number, self._remember) for number in handled()}

    def stop(self) -> None:
        """Give the signals back to their owners before `start`."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received is None:
            self._received, self._received_at = signal.Signals(number), now
            if number == signal.SIGINT:
                os.write(2, b"Ctrl-C: the step is finished and saved; again to leave at once\n")
            return
        is_ctrl_c = number == self._received == signal.SIGINT
        if now - self._received_at > (REPEAT_SECONDS_OF_CTRL_C if is_ctrl_c else REPEAT_SECONDS):
            leave_at_once(number, frame)
