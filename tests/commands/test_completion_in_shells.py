"""Completion as it is typed: each shell on a terminal of its own, from the first TAB on."""

import os
import pty
import re
import select
import shutil
import time
from pathlib import Path

import pytest

from lightning_peft.__main__ import main

SHELLS = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], "source ./script; echo r''eady\n"),
    "bash, where = divides no words": (
        ["bash", "--norc", "--noprofile", "-i"],
        "COMP_WORDBREAKS=${COMP_WORDBREAKS//=}; source ./script; echo r''eady\n",
    ),
    "zsh": (["zsh", "-f", "-i"], "autoload -Uz compinit; compinit -u -d dump; source ./script; echo r''eady\n"),
    "fish": (["fish", "--no-config", "-i"], "source ./script; echo r''eady\n"),
}
"""Shell -> its command, and what makes it ready to complete."""
STYLE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>()][A-Z0-9]?|.\x08|\x07")
TYPED = [("lightning-peft tra\t", "train"), ("method=ql\t", "method=qlora"), (" data=rows.js\t", "data=rows.jsonl"),
         (" optimizer.eps\t", "optimizer.eps=")]  # fmt: skip
"""Keys -> what stands on the line then."""


class Terminal:
    """A shell that is typed to."""

    def __init__(self, command: list[str], folder: Path):
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            os.execvpe(command[0], command, os.environ | {"TERM": "dumb", "HOME": str(folder)})
        self.written = ""

    def type(self, keys: str, until: str, seconds: float = 20) -> None:
        """Press keys, and wait for what they bring."""
        before = len(self.written)
        os.write(self.terminal, keys.encode())
        deadline = time.monotonic() + seconds
        while until not in STYLE.sub("", self.written[before:]).replace(" \r", ""):
            assert time.monotonic() < deadline, self.written[before:]
            if select.select([self.terminal], [], [], 0.1)[0]:
                self.written += os.read(self.terminal, 65536).decode(errors="replace")

    def leave(self) -> None:
        os.write(self.terminal, b"\x03exit\n")
        os.close(self.terminal)
        os.waitpid(self.pid, 0)


@pytest.mark.parametrize("shell", SHELLS)
def test_words_and_files_are_completed_as_they_are_typed(shell, tmp_path, capsys):
    command, ready = SHELLS[shell]
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    assert main(["completion", command[0]]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    (tmp_path / "rows.jsonl").touch()
    terminal = Terminal(command, tmp_path)
    try:
        terminal.type(ready, "ready")
        for keys, shown in TYPED:
            terminal.type(keys, shown)
    finally:
        terminal.leave()
