"""A teacher that is run once over all rows, before training; what is kept of it stands beside their tokens."""

import fcntl
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO
from uuid import uuid4

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from transformers import PreTrainedModel

from lightning_peft import distributed
from lightning_peft.checkpoint.lineage import installed_versions
from lightning_peft.data.batch import IGNORED_LABEL
from lightning_peft.data.cache import cache_folder, code_digest
from lightning_peft.data.chat import Encoded
from lightning_peft.data.collate import collate
from lightning_peft.data.datamodule import SFTDataModule
from lightning_peft.data.token_store import Samples
from lightning_peft.data.top_tokens import IDS
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
from lightning_peft.training.teacher_files import Unfinished, is_whole, remove_leftovers

logger = logging.getLogger(__name__)

TOKENS_AT_ONCE = 256
"""Tokens whose logits exist at once."""
READ_FROM = "the teacher's likeliest tokens are read from %s"
SECONDS_OF_PATIENCE = 10.0
"""Time that a rank looks for what rank zero has left, which a file server may show late."""


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
