"""The start of a run, kept in its folder: each command, a line each, and the files that it named."""

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lightning_peft.checkpoint.atomic import write_text
from lightning_peft.plugins import OWN_FILES
from lightning_peft.slips import with_home

FILE_NAME = "command.txt"

_words: list[str] = []
"""Command and words that this process was started with; empty in a program that trains by itself."""


@contextmanager
def started_by(words: Sequence[str], command: str = "train") -> Iterator[None]:
    """Have a run that begins inside the block be one of `lightning-peft COMMAND` with these words, if there are any."""
    global _words
    before, _words = _words, [command, *words] if words else []
    try:
        yield
    finally:
        _words = before


def kept_commands(run_dir: Path) -> list[str]:
    """Keep the command of this start in the run's folder; return those of all its starts, the first one first.

    A start from the folder's own `config.yaml`, as of the ranks of a run, is none of the user's where one is kept.
    """
    path = run_dir / FILE_NAME
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    saved = f"config_path={(run_dir / 'config.yaml').resolve()}"
    is_rank = bool(lines) and [_resolved(word) for word in _words[1:]] == [saved]
    line = shlex.join(["lightning-peft", *_words])
    if not _words or is_rank or "\n" in line or lines[-1:] == [line]:
        return lines
    lines.append(line)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join(lines) + "\n")
    for word in _words[1:]:
        own = Path(with_home(word.removeprefix("recipe=")))
        if own.suffix in (".yaml", ".yml") and "=" not in str(own) and own.is_file():
            (run_dir / OWN_FILES).mkdir(exist_ok=True)
            write_text(run_dir / OWN_FILES / own.name, own.read_text(encoding="utf-8-sig"))
    return lines


def _resolved(word: str) -> str:
    key, _, value = word.partition("=")
    return f"{key}={Path(value).resolve()}" if key == "config_path" else word
