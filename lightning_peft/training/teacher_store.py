"""A teacher that is run once over all rows, before training; what is kept of it stands beside their tokens."""

import errno
import fcntl
import hashlib
import io
import json
import logging
import os
import shutil
import time
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from numpy.lib.format import dtype_to_descr, write_array_header_1_0
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from lightning_peft import distributed
from lightning_peft.checkpoint.atomic import write_text
from lightning_peft.checkpoint.lineage import installed_versions
from lightning_peft.data.batch import IGNORED_LABEL
from lightning_peft.data.cache import cache_folder, code_digest
from lightning_peft.data.chat import Encoded
from lightning_peft.data.collate import collate
from lightning_peft.data.datamodule import SFTDataModule
from lightning_peft.data.token_store import Samples
from lightning_peft.data.top_tokens import IDS, LOG_PROBABILITIES, VOCABULARY
from lightning_peft.models.loading import empty_model
from lightning_peft.models.source import ModelConfig
from lightning_peft.models.stored import source_fingerprint
from lightning_peft.objectives.linear_cross_entropy import Readout
from lightning_peft.objectives.linear_divergence import bucketed, final_logits, in_fp32
from lightning_peft.objectives.sft import SupervisedLoss
from lightning_peft.objectives.teacher import TaughtConfig
from lightning_peft.progress import Part
from lightning_peft.quantization.config import QuantizationConfig
from lightning_peft.training.teacher import content_of_teacher, teacher_alone

logger = logging.getLogger(__name__)

TOKENS_AT_ONCE = 256
"""Tokens whose logits exist at once."""
READ_FROM = "the teacher's likeliest tokens are read from %s"
SUMS = "sums.json"
"""File of the checksums of the others."""
MARKS, SAMPLES = "marks.json", "samples"
"""File of how far a pass has come, as size and checksum of each file, and the key of the samples it has read."""
SECONDS_BETWEEN_MARKS = 10.0
"""Seconds of work that a pass which is killed may lose."""
BYTES_AT_ONCE = 2**24
"""Bytes of a file that are read at once for its checksum."""
SECONDS_OF_PATIENCE = 10.0
"""Time that a rank looks for what rank zero has left, which a file server may show late."""
SURELY_LEFT_SECONDS = 3600.0
"""Age of the last write from which on a folder is of a process that was killed."""


def keep_teacher(
    data: SFTDataModule,
    objective: TaughtConfig,
    model: ModelConfig,
    quantization: QuantizationConfig,
    dtype: torch.dtype,
    device: torch.device,
    cache_dir: str,
) -> None:
    """Give all samples of `data`, which is set up, what `objective.teacher_top_k` keeps of the teacher.

    Rank zero runs the teacher over the samples of which nothing is kept yet, and the others wait for it; so do other
    processes that want the same. Raises ValueError for a folder that cannot hold it, or that not all ranks see.
    """
    cache = cache_folder(cache_dir)
    content = {
        "objective": {k: str(v) for k, v in asdict(objective).items() if k in OF_THE_TEACHER},
        "teacher": content_of_teacher(objective),
        "base": source_fingerprint(model),
        "model": str(asdict(model)),
        "quantization": str(asdict(quantization)),
        "dtype": str(dtype),
        "versions": installed_versions(),
        "code": code_digest(*CODE_OF_THE_TEACHER),
    }
    vocabulary = int(empty_model(model).config.get_text_config().vocab_size)
    loaded: list[PreTrainedModel] = []

    def teacher() -> PreTrainedModel:
        if not loaded:
            loaded.append(teacher_alone(objective, model, quantization, dtype, device))
        return loaded[0]

    kept: list[tuple[Samples, Path]] = []
    for samples in data.sample_sets:
        if len(samples):
            text = json.dumps(content | {"samples": samples.fingerprint}, sort_keys=True)
            kept.append((samples, cache / f"teacher-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"))

    def make() -> Iterator[None]:
        for samples, folder in missing:
            with naming_cache(cache_dir):
                cache.mkdir(parents=True, exist_ok=True)
                file = folder.with_suffix(".lock").open("a")
            with file:
                has_lock = yield from locked(file)
                if is_whole(folder, reports_damage=True):
                    logger.info(READ_FROM, folder)
                    continue
                if has_lock:
                    remove_leftovers(folder)
                check_room(samples, objective, vocabulary, cache, cache_dir)
                yield  # the model that is read next takes its own time
                yield from write_top(teacher(), samples, objective, vocabulary, folder, cache_dir, has_lock)

    whole = distributed.on_rank_zero(lambda: [is_whole(folder) for _, folder in kept])
    missing = [part for part, is_there in zip(kept, whole, strict=True) if not is_there]
    if missing:
        check_shared(cache, cache_dir)
        distributed.on_rank_zero_in_steps(make)
    for (samples, folder), is_there in zip(kept, whole, strict=True):
        if is_there:
            logger.info(READ_FROM, folder)
        check_seen(folder, cache_dir)
        samples.keep_teacher(folder)


OF_THE_TEACHER = ("teacher", "teacher_adapter", "quantize_teacher", "temperature", "teacher_top_k")
"""Options that decide what is kept."""
CODE_OF_THE_TEACHER = ("adapters", "inference", "kernels", "models", "objectives", "quantization")
"""Folders of the package whose code does."""


@contextmanager
def naming_cache(option: str) -> Iterator[None]:
    """Say of `data.cache_dir`, inside the block, that a file operation failed."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"data.cache_dir={option}: {error.strerror or error}, and what is kept of the teacher is written there; "
            "give a folder with room for it, or objective.teacher_top_k=null"
        ) from error


def check_shared(cache: Path, option: str) -> None:
    """Raise ValueError, on every rank and before a teacher is run, where a rank does not see what rank zero writes."""
    if not distributed.is_connected():
        return

    def leave() -> str:
        with naming_cache(option):
            cache.mkdir(parents=True, exist_ok=True)
            folder = cache / f"seen-by-ranks-{uuid4().hex}"
            folder.mkdir()
            return folder.name

    left = cache / distributed.on_rank_zero(leave)
    try:
        check_seen(left, option)
    finally:
        if distributed.rank() == 0:
            left.rmdir()


def check_seen(folder: Path, option: str) -> None:
    """Raise ValueError, on every rank, where a rank does not see a folder that rank zero sees."""
    end = time.monotonic() + SECONDS_OF_PATIENCE
    while not (is_seen := folder.is_dir()) and time.monotonic() < end:
        time.sleep(0.2)
    blind = distributed.highest(0 if is_seen else distributed.rank())
    if blind:
        raise ValueError(
            f"data.cache_dir={option}: rank {blind} does not see what rank 0 writes there, and reads what is kept of "
            "the teacher; give a folder that all nodes share, or objective.teacher_top_k=null"
        )


def locked(file: IO[str]) -> Generator[None, None, bool]:
    """Lock an open file, yielding while another process holds it; return False where the file system has no locks."""
    is_said = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if not is_said:
                logger.info("another process runs the teacher over the same rows: waiting for it")
                is_said = True
            time.sleep(0.2)
            yield
        except OSError as error:
            # Each process writes its own then, and the first one stays.
            logger.warning("%s: no lock (%s): other processes may run the teacher as well", file.name, error.strerror)
            return False


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


def check_room(samples: Samples, objective: TaughtConfig, vocabulary: int, cache: Path, option: str) -> None:
    """Raise ValueError, before the teacher is read, where the disk has no room for what is kept of it."""
    assert objective.teacher_top_k is not None
    count = min(objective.teacher_top_k, vocabulary)
    size, free = int(samples.trained_starts[-1]) * (2 * count + 1) * 4, shutil.disk_usage(cache).free
    if size > free:
        raise ValueError(
            f"data.cache_dir={option}: has {free / 2**20:,.0f} MiB free, and objective.teacher_top_k={count} at "
            f"{samples.trained_starts[-1]:,} tokens takes {size / 2**20:,.0f} MiB; give a folder with room for it, or "
            "keep fewer tokens"
        )


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


def write_top(
    model: PreTrainedModel,
    samples: Samples,
    objective: TaughtConfig,
    vocabulary: int,
    folder: Path,
    option: str,
    is_locked: bool = False,
) -> Iterator[None]:
    """Run the teacher over the samples, each a row of its own, and leave what is kept in `folder`; yield after each.

    `option` is `data.cache_dir`. The folder has a name of its own until it is whole; where the store is locked, a
    pass that was stopped goes on from what it has marked.
    """
    shared = min(vocabulary, int(model.config.get_text_config().vocab_size))
    assert objective.teacher_top_k is not None
    count = min(objective.teacher_top_k, shared)
    total = int(samples.trained_starts[-1])
    with naming_cache(option):
        unfinished = Unfinished(folder, is_locked, total, count, count + (count < shared))
    try:
        with naming_cache(option), Part("the teacher reads the rows", len(samples)) as part:
            part.advance(unfinished.samples)
            for place in range(unfinished.samples, len(samples)):
                for found, values in top_of_sample(model, samples[place], objective, count, shared):
                    unfinished.write(found, values)
                unfinished.end_sample()
                part.advance()
                yield
            size = sum(file.size for file in unfinished.files.values()) / 2**20
            written = unfinished.files[IDS].size // (4 * count)
            assert written == total, f"{written} tokens of {total}: {IGNORED_LABEL} is the label of all others"
            unfinished.finish(folder, shared)
    except ValueError:  # the disk is full, and has other uses for the room
        unfinished.remove()
        raise
    finally:
        unfinished.close()
        if not is_locked:
            unfinished.remove()
    logger.info("the teacher's %d likeliest tokens at %d tokens are kept in %s (%.1f MiB)", count, total, folder, size)


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


@torch.inference_mode()
def top_of_sample(
    model: PreTrainedModel, sample: Encoded, objective: TaughtConfig, count: int, vocabulary: int
) -> list[tuple[Tensor, Tensor]]:
    """Return `top_of` at the trained tokens of one sample, some tokens at a time."""
    read = sample.taught or sample
    batch = collate([[read]], 0, len(read.input_ids) + 8, False)
    readout = SupervisedLoss(model, packing=False).eval().readout(move_data_to_device(batch, model.device))
    starts = range(0, len(readout.labels), TOKENS_AT_ONCE)
    cuts = [slice(start, start + TOKENS_AT_ONCE) for start in starts]
    return [top_of(readout, tokens, count, vocabulary, objective.temperature) for tokens in cuts]


def top_of(readout: Readout, tokens: slice, count: int, vocabulary: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the likeliest tokens of some of a readout's (n, count), and the log-probabilities of `bucketed`."""
    logits = in_fp32(final_logits(readout, tokens))[:, :vocabulary] / temperature
    ids = logits.topk(count, dim=-1).indices
    return ids, bucketed(logits, ids)
