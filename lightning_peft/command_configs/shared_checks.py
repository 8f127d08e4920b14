"""Checks of options that several commands have."""

from pathlib import Path


def check_folder_of(key: str, file: str | None) -> None:
    """Raise ValueError for a file in a folder that is not there, before anything is computed for it."""
    if file is not None and not Path(file).absolute().parent.is_dir():
        raise ValueError(f"{key}={file}: there is no folder {Path(file).parent}; make it first")


def check_seed(seed: int) -> None:
    """Raise ValueError for a seed that torch's generators do not take, or that a number added to it would make one."""
    if not 0 <= seed < 2**62:
        raise ValueError(f"seed={seed}: must be from 0 to 2^62 - 1")
