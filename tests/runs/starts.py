"""Starts of the command line, as a person or a scheduler makes them."""

import subprocess
from pathlib import Path

from started import COMMAND, Started
from tiny_runs import TINY

TRAIN = [*COMMAND, "train", *TINY]


def started(*words: str, cwd: Path, command: list[str] = TRAIN) -> subprocess.Popen[str]:
    return Started(
        [*command, *words], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def ended(*words: str, cwd: Path, command: list[str] = TRAIN) -> tuple[int, str]:
    """Exit status and everything printed."""
    process = started(*words, cwd=cwd, command=command)
    text, _ = process.communicate(timeout=300)
    return process.returncode, text
