"""The files of what is kept of a teacher: written row by row, gone on with after a kill, and checked when read."""

import errno
import io
import json
import logging
import os
import shutil
import time
import zlib
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.lib.format import dtype_to_descr, write_array_header_1_0
from numpy.typing import NDArray
from torch import Tensor

from lightning_peft.checkpoint.atomic import write_text
from lightning_peft.data.top_tokens import IDS, LOG_PROBABILITIES, VOCABULARY

logger = logging.getLogger(__name__)

SUMS = "sums.json"
"""File of the checksums of the others."""
MARKS, SAMPLES = "marks.json", "samples"
"""File of how far a pass has come, as size and checksum of each file, and the key of the samples it has read."""
SECONDS_BETWEEN_MARKS = 10.0
"""Seconds of work that a pass which is killed may lose."""
BYTES_AT_ONCE = 2**24
"""Bytes of a file that are read at once for its checksum."""
SURELY_LEFT_SECONDS = 3600.0
"""Age of the last write from which on a folder is of a process that was killed."""


def is_whole(folder: Path, reports_damage: bool = False) -> bool:
    """Return whether a folder holds what was written into it."""
    if not folder.is_dir():
        return False
    try:
        found = {name: zlib.crc32(np.load(folder / name, mmap_mode="r").data) for name in (IDS, LOG_PROBABILITIES)}
        np.load(folder / VOCABULARY)
        if found != json.loads((folder / SUMS).read_text()):
            raise ValueError("its checksum is another")
    except (OSError, ValueError, EOFError) as error:
        if reports_damage:
            logger.warning("%s is damaged (%s): the teacher is run again", folder, error)
        return False
    return True


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that were killed had written of a folder, whose lock is held."""
    for partial in folder.parent.glob(f"{folder.name}.*.partial"):
        newest = max(path.stat().st_mtime for path in (partial, *partial.iterdir()))
        if time.time() - newest > SURELY_LEFT_SECONDS:
            shutil.rmtree(partial, ignore_errors=True)


class RowFile:
    """A .npy file whose rows are written one after the other: no hole in it that a full disk would show on reading.

    One that was left at a mark goes on there. Raises ValueError where the file is not what was written up to it.
    """

    def __init__(
        self, path: Path, dtype: type[np.generic], shape: tuple[int, int], mark: tuple[int, int] | None = None
    ) -> None:
        self.dtype, self.checksum, self.size = np.dtype(dtype), 0, 0
        beginning = io.BytesIO()
        write_array_header_1_0(beginning, {"descr": dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape})
        header = beginning.getvalue()
        self.file = path.open("wb" if mark is None else "r+b")
        if mark is None:
            self.file.write(header)
            return
        size, checksum = mark
        is_header = self.file.read(len(header)) == header
        while is_header and self.size < size and (part := self.file.read(min(BYTES_AT_ONCE, size - self.size))):
            self.checksum = zlib.crc32(part, self.checksum)
            self.size += len(part)
        if (self.size, self.checksum) != (size, checksum):
            self.file.close()
            raise ValueError(f"{path}: is not what was written")
        self.file.truncate()

    def write(self, rows: NDArray[Any]) -> None:
        content = np.ascontiguousarray(rows, dtype=self.dtype).tobytes()
        self.file.write(content)
        self.checksum = zlib.crc32(content, self.checksum)
        self.size += len(content)

    def mark(self) -> tuple[int, int]:
        """Return size and checksum of what is written, once it is on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.size, self.checksum

    def close(self) -> None:
        self.file.close()


class Unfinished:
    """The part that a pass of the teacher has written so far, in a folder beside the one that it is to be.

    Where the store is locked, the folder has one name, so that a pass that was killed goes on at its last mark; else it
    has a name of its own, and goes with the process.
    """

    def __init__(self, folder: Path, is_locked: bool, tokens: int, count: int, columns: int):
        self.is_locked = is_locked
        self.path = folder.with_name(f"{folder.name}.partial" if is_locked else f"{folder.name}.{uuid4().hex}.partial")
        self.marked_at = time.monotonic()
        self.shapes: dict[str, tuple[type[np.int32 | np.float32], tuple[int, int]]]
        self.shapes = {IDS: (np.int32, (tokens, count)), LOG_PROBABILITIES: (np.float32, (tokens, columns))}
        self.samples = 0
        """Samples that are written whole."""
        try:
            marks = json.loads((self.path / MARKS).read_text())
            self.files = self._opened({name: tuple(marks[name]) for name in self.shapes})
            self.samples = int(marks[SAMPLES])
            logger.info("the teacher's pass was stopped after %d rows: it goes on there", self.samples)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if not isinstance(error, FileNotFoundError):
                logger.warning("%s is damaged (%s): the teacher's pass begins again", self.path, error)
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir()
            self.files = self._opened({})

    def _opened(self, marks: dict[str, tuple[int, int]]) -> dict[str, RowFile]:
        files: dict[str, RowFile] = {}
        try:
            for name, shape in self.shapes.items():
                files[name] = RowFile(self.path / name, *shape, marks.get(name))
        except BaseException:
            for file in files.values():
                file.close()
            raise
        return files

    def write(self, ids: Tensor, log_probabilities: Tensor) -> None:
        self.files[IDS].write(ids.cpu().numpy())
        self.files[LOG_PROBABILITIES].write(log_probabilities.cpu().numpy())

    def end_sample(self) -> None:
        """Count a sample as written, and mark the place from time to time."""
        self.samples += 1
        if not self.is_locked or time.monotonic() - self.marked_at < SECONDS_BETWEEN_MARKS:
            return
        marks: dict[str, Any] = {name: file.mark() for name, file in self.files.items()}
        write_text(self.path / MARKS, json.dumps(marks | {SAMPLES: self.samples}))
        self.marked_at = time.monotonic()

    def finish(self, folder: Path, vocabulary: int) -> None:
        """Give the folder, which is whole, its name."""
        np.save(self.path / VOCABULARY, np.asarray(vocabulary))
        (self.path / SUMS).write_text(json.dumps({name: file.checksum for name, file in self.files.items()}))
        self.close()
        (self.path / MARKS).unlink(missing_ok=True)
        put_in_place(self.path, folder)

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    def remove(self) -> None:
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)


def put_in_place(partial: Path, folder: Path) -> None:
    """Give a whole folder its name, unless another process did so with its own, where there are no locks."""
    try:
        partial.rename(folder)
        return
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
    if not is_whole(folder):
        shutil.rmtree(folder)
        partial.rename(folder)
