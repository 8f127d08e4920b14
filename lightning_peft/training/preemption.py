"""The one owner of SIGTERM, SIGUSR1 and SIGUSR2: what SLURM, torchrun or a shell send before they take a machine.

- Before the first step the process leaves at once: nothing is lost. Exit status 75.
- During training the step and a validation behind it are finished, a checkpoint is written, loggers are flushed and
  `result.json` says preempted. Exit status 75.
- A second signal some seconds later makes the process leave at once; the last checkpoint stands. Exit status 75.
- Ctrl-C is no request to go on: the process leaves at once, with status 130. The last checkpoint stands.

75 (EX_TEMPFAIL of sysexits.h) says: run the same command again, with resume=auto, and it ends as if nothing had been.
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
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
REPEAT_SECONDS = 5.0
"""A signal so soon after the first is the same request: SLURM signals a launcher and its ranks, and one forwards it."""


class Preempted(SystemExit):
    """Raised on every rank once the checkpoint is written; ends the process with status 75."""

    def __init__(self) -> None:
        super().__init__(PREEMPTED)


def leave_at_once(number: int, frame: FrameType | None) -> None:
    """Signal handler for when there is nothing to save."""
    os.write(
        2, f"{signal.Signals(number).name}: leaving at once; resume=auto goes on from the last checkpoint\n".encode()
    )
    os._exit(PREEMPTED)


@contextmanager
def nothing_to_lose() -> Iterator[None]:
    """While the block runs, and no `PreemptionSignals` is started in it, a signal ends the process with status 75."""
    previous = {number: signal.signal(number, leave_at_once) for number in SIGNALS}
    try:
        yield
    except Preempted:
        # The status stands: launchers kill what has not left yet, and Python would take the handlers away at exit.
        previous = dict.fromkeys(SIGNALS, signal.SIG_IGN)
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class PreemptionSignals:
    """Remembers a signal until the next step boundary; the handler does nothing else.

    A save inside a handler meets whatever the step was doing: ranks then wait for each other in different collectives.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._received_at = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def start(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            logger.info("training outside the main thread: signals end it without a checkpoint")
            return
        self._previous = {number: signal.signal(number, self._remember) for number in SIGNALS}

    def stop(self) -> None:
        """Give the signals back to their owners before `start`."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = signal.Signals(number), now
        elif now - self._received_at > REPEAT_SECONDS:
            leave_at_once(number, frame)
