"""The state of the git checkout that a run is started from."""

import os
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

SECONDS = 10.0
"""Time that git may take: the files of a large checkout on a network are many."""


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return commit, branch, remote (null without one) and whether tracked files differ from the commit.

    The result is None outside of a checkout, without a commit, and where git is not installed or does not answer.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return None
    branch, remote = _git(folder, "rev-parse", "--abbrev-ref", "HEAD"), _git(folder, "remote", "get-url", "origin")
    is_dirty = bool(changes)
    return {
        "commit": commit, "branch": branch, "remote": None if remote is None else without_credentials(remote),
        "dirty": is_dirty,
    }  # fmt: skip


def without_credentials(remote: str) -> str:
    """Return an address without the name and the password in it, which may be a token."""
    parts = urlsplit(remote)
    if not parts.netloc:
        return remote  # git@host:path has a name that is everybody's
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _git(folder: Path, *words: str) -> str | None:
    # git only reads here: without the lock a git command beside it is not disturbed.
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=SECONDS, env=environment
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
