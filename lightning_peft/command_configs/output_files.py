"""The files that commands write, checked with their options."""

from pathlib import Path


def check_folder_of(key: str, file: str | None) -> None:
    """Raise ValueError for a file in a folder that is not there, before anything is computed for it."""
    if file is not None and not Path(file).absolute().parent.is_dir():
        raise ValueError(f"{key}={file}: there is no folder {Path(file).parent}; make it first")
