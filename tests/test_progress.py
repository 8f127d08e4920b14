"""The line of a long part, in a process of its own on a pseudo-terminal."""

import logging
import os
import pty
import re
import time

import pytest

from lightning_peft import progress
from lightning_peft.progress import Part


def written_to_terminal(work) -> str:
    """Run a process that does the work; return what it writes to a terminal of 80 columns."""
    child, terminal = pty.fork()
    if child == 0:
        os.environ |= {"TERM": "xterm", "COLUMNS": "80"}
        import sys

        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
        try:
            work()
        finally:
            sys.stdout.flush()
            os._exit(0)
    written = b""
    try:
        while piece := os.read(terminal, 65536):
            written += piece
    except OSError:  # the other end is closed
        pass
    os.waitpid(child, 0)
    return written.decode()


def test_log_lines_and_prints_stand_above_the_line():
    def work() -> None:
        with Part("scoring", 4) as part:
            part.advance()
            logging.getLogger().warning("a warning")
            part.advance()
            print("a print")
        print("the end")

    pieces = written_to_terminal(work).split("\r\x1b[2K")
    assert pieces[-1] == "the end\r\n"
    assert [piece for piece in pieces if "\n" in piece] == ["a warning\r\n", "a print\r\n", "the end\r\n"]
    frames = [piece for piece in pieces if piece and "\n" not in piece]
    assert re.fullmatch(r"scoring  ━{5}╌{15}  1/4  \d s left", frames[1])
    assert re.fullmatch(r"scoring  ━{10}╌{10}  2/4  \d s left", frames[2])


def test_part_within_a_part_is_the_one_shown():
    def work() -> None:
        with Part("outer"):
            with Part("inner"):
                print("now")

    frames = [piece for piece in written_to_terminal(work).split("\r\x1b[2K") if piece and "\n" not in piece]
    assert [frame.split()[0] for frame in frames] == ["outer", "inner", "inner", "outer"]


def test_error_within_a_part_clears_the_line():
    def work() -> None:
        with pytest.raises(ValueError, match="lost"), Part("loading"):
            raise ValueError("lost")

    assert written_to_terminal(work).endswith("\r\x1b[2K")


def test_log_gets_a_line_when_it_is_due(monkeypatch, caplog):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.05)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LOOKS", 0.01)
    with caplog.at_level(logging.INFO), Part("scoring", 2_000) as part:
        part.advance(1_000)
        time.sleep(0.3)
    lines = [record.getMessage() for record in caplog.records]
    assert 1 <= len(lines) <= 6
    assert lines[0] == "scoring  1,000/2,000  0 s left"


def test_short_part_logs_nothing(caplog):
    with caplog.at_level(logging.INFO), Part("scoring", 2) as part:
        part.advance(2)
    assert caplog.records == []
