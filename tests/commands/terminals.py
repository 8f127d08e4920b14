"""A command under a pseudo-terminal, and its screen."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
from dataclasses import dataclass
from pathlib import Path

COMMAND = str(Path(sys.executable).parent / "lightning-peft")
STYLE = re.compile(r"\x1b\[[0-9;]*m")


@dataclass
class Capture:
    """The text that a command wrote to a terminal of so many columns."""

    text: str
    columns: int
    exit_status: int

    @property
    def frames(self) -> list[str]:
        """Return every state of the renewed line, in order."""
        pieces = STYLE.sub("", self.text).split("\r\x1b[2K")[1:]
        return [piece for piece in pieces if piece and "\n" not in piece]  # a log line ends

    @property
    def screen(self) -> list[str]:
        """Return the lines that stand when the command has ended, of a terminal that wraps at its last column."""
        rows, row, column = [""], 0, 0
        for token in re.findall(r"\x1b\[2K|\r|\n|[^\x1b]", STYLE.sub("", self.text)):
            if token == "\x1b[2K":
                rows[row] = ""
            elif token == "\r":
                column = 0
            elif token == "\n":
                row += 1
                rows.append("")
            else:
                if column == self.columns:
                    row, column = row + 1, 0
                    rows.append("")
                rows[row] = rows[row][:column].ljust(column) + token + rows[row][column + 1 :]
                column += 1
        return [line.rstrip() for line in rows]


def all_written_to(terminal: int) -> bytes:
    """Return what is written until the other end is closed."""
    written = b""
    while True:
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # the other end is closed
            return written
        if not piece:
            return written
        written += piece


def run_in_terminal(words: list[str], columns: int, folder: Path) -> Capture:
    """Run `lightning-peft WORDS` in `folder` on a terminal of 40 lines."""
    child, terminal = pty.fork()
    if child == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        os.chdir(folder)
        os.execvpe(COMMAND, [COMMAND, *words], os.environ | {"TERM": "xterm-256color"})
    written = all_written_to(terminal)
    _, status = os.waitpid(child, 0)
    os.close(terminal)
    return Capture(written.decode(), columns, os.waitstatus_to_exitcode(status))
