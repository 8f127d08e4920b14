"""Small disks of a test's own, and disks without room."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


@contextmanager
def mounted(folder: Path, size: str = "64k", lazy: bool = False) -> Iterator[Path]:
    """Make a folder on a disk of so many bytes, until the block ends; skip the test where mounting is not allowed.

    lazy: let the disk go although a process still has a file of it open.
    """
    folder.mkdir(parents=True)
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"mounting a disk needs root: {mount.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", *(["--lazy"] if lazy else []), str(folder)], check=True)


def fill(path: Path) -> None:
    """Write a file until its disk has no byte left."""
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Make a folder's disk read-only for whoever opens its files from now on, until the block ends.

    A kernel does so to a disk with errors, whatever is open; of its own accord it refuses while files are written.
    """
    place = str(folder)
    bound = subprocess.run(["mount", "--bind", place, place], capture_output=True, text=True)
    if bound.returncode:
        pytest.skip(f"mounting a disk needs root: {bound.stderr.strip()}")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", place], check=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)
