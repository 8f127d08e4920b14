"""The progress of a long part of a command: one line that renews itself on a terminal, log lines anywhere else."""

import logging
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Self, TextIO, TypeVar

from lightning_peft.readable import duration

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0
"""Time between two log lines of a part, where stderr is no terminal."""
SECONDS_BETWEEN_LOOKS = 0.5
"""Time between two looks of the thread that renews the line."""
BAR_WIDTH = 20
T = TypeVar("T")
CLEAR = "\r\x1b[2K"


class Part:
    """A long part of a command, as in `with Part("scoring the base", 200) as part: part.advance(32)`.

    Without a total only the time so far is shown. Parts may be nested: the innermost is the one shown. Nothing is shown
    by a process whose logger does not say INFO, as ranks beside the first do.
    """

    def __init__(self, name: str, total: float | None = None):
        self.name = name
        self.total = total
        self.done = 0.0
        self.started = self.told = time.monotonic()
        self.stopped = threading.Event()
        self.thread: threading.Thread | None = None

    def counting(self, items: Iterable[T]) -> Iterator[T]:
        """Return the items, each of which advances this part as it is taken."""
        for item in items:
            self.advance()
            yield item

    def advance(self, amount: float = 1.0) -> None:
        self.done += amount

    def __enter__(self) -> Self:
        self.started = self.told = time.monotonic()
        if logger.isEnabledFor(logging.INFO):
            SCREEN.open(self)
            self.thread = threading.Thread(target=self.keep_showing, daemon=True, name=self.name)
            self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopped.set()
        if self.thread is not None:
            self.thread.join()
        SCREEN.close(self)

    def keep_showing(self) -> None:
        while not self.stopped.wait(SECONDS_BETWEEN_LOOKS):
            SCREEN.renew(self)

    @property
    def share(self) -> float | None:
        """Return the share that is done, 0 to 1; None where the total is not known."""
        return min(self.done / self.total, 1.0) if self.total else None

    def text(self, width: int) -> str:
        """Return the line on a terminal of so many columns."""
        bar = "" if self.share is None else drawn_bar(self.share, BAR_WIDTH)
        return fitting([[self.name, bar, self.count], [self.time]], width)

    def due_line(self) -> str | None:
        """Return the line for a log, None as long as the last one is younger than `SECONDS_BETWEEN_LINES`."""
        now = time.monotonic()
        if now - self.told < SECONDS_BETWEEN_LINES:
            return None
        self.told = now
        return "  ".join(piece for piece in (self.name, self.count, self.time) if piece)

    @property
    def count(self) -> str:
        if self.total is None:
            return f"{int(self.done):,}" if self.done else ""
        return f"{math.floor(self.done + 1e-6):,}/{int(self.total):,}"

    @property
    def time(self) -> str:
        seconds = time.monotonic() - self.started
        if not self.share:
            return f"{duration(seconds)} so far"
        return f"{duration(seconds * (1 - self.share) / self.share)} left"


def drawn_bar(share: float, width: int) -> str:
    filled = round(share * width)
    return "━" * filled + "╌" * (width - filled)


def fitting(groups: list[list[str]], width: int) -> str:
    """Join pieces of text to a line below `width` columns; the pieces of the last groups are left out first."""
    for number in range(len(groups), 0, -1):
        pieces = [piece for group in groups[:number] for piece in group if piece]
        for gap in ("  ", " "):
            if len(line := gap.join(pieces)) < width:
                return line
    return line[: width - 1]


class Above:
    """A stream whose text comes to stand above the line at the bottom of the terminal."""

    def __init__(self, stream: TextIO, screen: "Screen"):
        self.stream = stream
        self.screen = screen

    def write(self, text: str) -> int:
        with self.screen.lock:
            self.screen.clear()
            written = self.stream.write(text)
            self.stream.flush()
            self.screen.is_within_line = bool(text) and not text.endswith("\n")
            self.screen.draw()
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Screen:
    """The line at the bottom of the terminal, of the innermost part at work."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.parts: list[Part] = []
        self.terminal: TextIO | None = None
        self.is_drawn = self.is_within_line = False
        self.replaced: list[tuple[Any, TextIO]] = []

    def open(self, part: Part) -> None:
        with self.lock:
            self.parts.append(part)
            if len(self.parts) == 1 and is_terminal(sys.stderr):
                self.take_terminal()
            self.draw()

    def close(self, part: Part) -> None:
        with self.lock:
            if part in self.parts:
                self.clear()
                self.parts.remove(part)
                self.draw()
                if not self.parts:
                    self.give_back()

    def take_terminal(self) -> None:
        self.terminal, self.is_within_line = sys.stderr, False
        for name in ("stderr", "stdout"):
            stream = getattr(sys, name)
            if not is_terminal(stream):
                continue
            above: Any = Above(stream, self)
            for handler in logging.getLogger().handlers:
                if isinstance(handler, logging.StreamHandler) and handler.stream is stream:
                    self.replaced.append((handler, stream))
                    handler.setStream(above)
            self.replaced.append((name, stream))
            setattr(sys, name, above)

    def give_back(self) -> None:
        for owner, stream in self.replaced:
            owner.setStream(stream) if isinstance(owner, logging.StreamHandler) else setattr(sys, owner, stream)
        self.replaced, self.terminal = [], None

    def renew(self, part: Part) -> None:
        """Draw the line of a part, or log it when that is due; do nothing where a part within it is at work."""
        with self.lock:
            if not self.parts or self.parts[-1] is not part:
                return
            if self.terminal is not None:
                self.draw()
                return
            line = part.due_line()
        if line is not None:
            logger.info("%s", line)

    def draw(self) -> None:
        if self.terminal is None or not self.parts or self.is_within_line:
            return
        text = self.parts[-1].text(shutil.get_terminal_size().columns)
        self.terminal.write(CLEAR + text)
        self.terminal.flush()
        self.is_drawn = True

    def clear(self) -> None:
        if self.terminal is not None and self.is_drawn:
            self.terminal.write(CLEAR)
            self.terminal.flush()
        self.is_drawn = False

    def forget(self) -> None:
        """Leave the terminal to the process that this one was forked from."""
        self.give_back()
        self.lock, self.parts, self.is_drawn = threading.RLock(), [], False


def is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


SCREEN = Screen()
os.register_at_fork(after_in_child=SCREEN.forget)
