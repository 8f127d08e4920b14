"""End a process that was told to leave and cannot, as its main thread waits for a rank that hangs or never came.

Python runs a signal's handler between two instructions of the main thread, so not while that waits inside a library.
But the number of the signal is written to a pipe at once, where a thread reads it.
"""

import math
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from lightning_peft.training.preemption import AT_ONCE, REPEAT_SECONDS, exit_status_of

LEAVES_WITHIN = 2.0
"""Seconds for the handlers of a process that has nothing to save."""
HANG_SECONDS = 30.0
"""A signalled run is taken to hang after so long, or three times its longest step if that is more, without progress."""
IDLE_SHARE = 0.05
"""Part of the time for which the main thread computes in a wait. More of it is a long step, a compilation, a save."""
SECONDS_BETWEEN_LOOKS = 0.2
WATCHED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class SignalWatch:
    """A watch which, inside `watching()`, lets a signal end the process, whatever its main thread waits for."""

    def __init__(self) -> None:
        self._pipe: tuple[int, int] | None = None
        self._told: tuple[float, int] | None = None
        self._patience = math.inf
        self._longest = 0.0
        self._last = (0.0, 0.0)
        self._works_in_threads = False
        """True where other threads than the main one train, one at a time."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the main thread of a command. Until its first progress, a signalled one has LEAVES_WITHIN seconds."""
        if self._pipe is None:
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            # Processes forked from this one are signalled for themselves.
            os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
            threading.Thread(target=self._watch, args=(self._pipe[0],), daemon=True).start()
        self._told, self._patience, self._works_in_threads = None, LEAVES_WITHIN, False
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        try:
            yield
        finally:
            self.stop()

    def stop(self) -> None:
        """Watch no more."""
        signal.set_wakeup_fd(-1)
        self._told, self._patience = None, math.inf

    def begins_to_train(self) -> None:
        """Note that the first step is about to be taken, in this thread."""
        self._works_in_threads = threading.current_thread() is not threading.main_thread()
        self._patience, self._longest, self._last = HANG_SECONDS, 0.0, self._clocks()

    def progress(self) -> None:
        """Note that a step, or a part of a validation, is done."""
        now = self._clocks()
        self._longest = max(self._longest, now[0] - self._last[0])
        self._patience, self._last = max(HANG_SECONDS, 3 * self._longest), now

    def leaves_by_itself(self) -> None:
        """Note that the process saves, however long that takes; a repeated signal ends it."""
        self._patience = math.inf

    def _clocks(self) -> tuple[float, float]:
        """Return (time, time for which the main thread computed, or the process where others train), seconds."""
        if self._works_in_threads:
            return time.monotonic(), time.process_time()
        identity = threading.main_thread().ident
        assert identity is not None
        if not hasattr(time, "pthread_getcpuclockid"):  # macOS: time without progress decides alone
            return time.monotonic(), 0.0
        return time.monotonic(), time.clock_gettime(time.pthread_getcpuclockid(identity))

    def _watch(self, pipe: int) -> None:
        while True:
            readable, _, _ = select.select([pipe], [], [], None if self._told is None else SECONDS_BETWEEN_LOOKS)
            now = time.monotonic()
            if readable:
                for number in os.read(pipe, 256):
                    self._note(number, now)
            elif self._told is not None and self._is_stuck(now):
                waited = f"no progress in {now - self._last[0]:.0f} s, another rank may hang or be missing"
                leave(self._told[1], waited)

    def _note(self, number: int, now: float) -> None:
        if number not in WATCHED:
            return
        if self._told is None:
            self._told, self._last = (now, number), self._clocks()
        elif now - self._told[0] > REPEAT_SECONDS:
            leave(number, "told again")

    def _is_stuck(self, now: float) -> bool:
        since, computed = self._last
        return now - since > self._patience and self._clocks()[1] - computed < IDLE_SHARE * (now - since)


def leave(number: int, reason: str) -> None:
    name = signal.Signals(number).name
    os.write(2, f"{name}: {reason}: {AT_ONCE}\n".encode())
    os._exit(exit_status_of(number))


SIGNAL_WATCH = SignalWatch()
"""The watch of this process."""
