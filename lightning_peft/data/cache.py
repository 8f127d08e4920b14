"""Tokenised samples on disk, so that the next start, the other ranks and the other trials need not tokenise again.

An entry is a folder named by everything that decides its tokens, so it is never out of date: other rows, options,
tokenizer, library versions or code of this package give another name. Deleting one costs the time to make it again.
"""

import fcntl
import hashlib
import inspect
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from enum import Enum
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_peft.data.audit import Audit
from lightning_peft.data.config import DataConfig, Format
from lightning_peft.data.formats import FORMATS, RowFormat
from lightning_peft.data.samples import make_samples
from lightning_peft.data.sources import rows_identity
from lightning_peft.data.token_store import Samples
from lightning_peft.data.tokenizer_template import log_layout
from lightning_peft.user_cache import user_cache

log = logging.getLogger(__name__)

NO_EFFECT = frozenset(
    ("task", "packing", "micro_batch_size", "streaming", "shuffle_window", "num_workers", "preview", "cache_dir")
    + ("sources", "temperature")
)
"""Options of `data` that change no token of a sample."""
LIBRARIES = ("transformers", "tokenizers", "jinja2")
COUNTS = "counts.json"


def cached_samples(config: DataConfig, split: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Samples, Audit]:
    """Return the samples of a split and their counts: mapped from `data.cache_dir`, or tokenised and left there.

    One process tokenises, the others that want the same wait for it; when it could not keep the tokens they all
    tokenise, at the same time. Streamed rows are not kept. Raises what `make_samples` raises.
    """
    if config.cache_dir is None or config.streaming:
        return make_samples(config, split, tokenizer)
    if hidden := next((name for name, row_format in own_formats() if _source_digest(row_format) is None), None):
        log.info("data.format=%s: its code is in no file, so tokens are not kept", hidden)
        return make_samples(config, split, tokenizer)
    entry = cache_folder(config.cache_dir) / entry_name(config, split, tokenizer)
    found = _read(entry)
    if found is None:
        with ExitStack() as lock:
            try:
                waited = lock.enter_context(_alone(entry))
            except OSError as error:
                log.warning(
                    "data.cache_dir=%s: %s, so tokens are not kept; give a folder that can be written to, or null",
                    config.cache_dir, error.strerror,
                )  # fmt: skip
                return make_samples(config, split, tokenizer)
            found = _read(entry, report_damage=True)
            if found is None and not waited:
                return _make_and_keep(config, split, tokenizer, entry)
    if found is None:  # outside the lock, as all that waited are here now
        log.info("%s rows: the process waited for kept no tokens", split)
        return make_samples(config, split, tokenizer)
    samples, audit = found
    if audit.format not in (None, Format.text):
        log_layout(tokenizer)
    log.info("%s rows: tokens read from %s (%.1f MiB)", split, entry, _mebibytes(entry))
    return samples, audit


def cache_folder(option: str) -> Path:
    """Return the folder that `data.cache_dir` names."""
    if option == "auto":
        return user_cache()
    return Path(os.path.expanduser(option))


def entry_name(config: DataConfig, split: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return sixteen hex digits that change with anything that decides the tokens of a split.

    Raises ValueError for a missing or empty file or data set.
    """
    options = {name: value for name, value in asdict(config).items() if name not in NO_EFFECT}
    decides = {
        "split": split,
        "rows": rows_identity(config, split),
        "options": options,
        "tokenizer": [
            type(tokenizer).__name__,
            tokenizer.chat_template,
            _tokenizer_digest(tokenizer),
            getattr(tokenizer, "split_special_tokens", None),
        ],
        "code": code_digest("data", "tasks"),
        "own formats": {name: _source_digest(row_format) for name, row_format in own_formats()},
        "versions": [platform.python_version(), *(version(library) for library in LIBRARIES)],
    }
    text = json.dumps(decides, sort_keys=True, default=_choice)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _choice(option: Any) -> Any:
    if isinstance(option, Enum):
        return option.value
    raise TypeError(f"{option!r} is no option")


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    digest = hashlib.blake2b(json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())  # vocabulary, merges, added tokens, normalisation
    return digest.hexdigest()


@cache
def code_digest(*parts: str) -> str:
    """Return the digest of the modules in folders of this package, whose change may change what they made."""
    digest = hashlib.blake2b()
    package = Path(__file__).parents[1]
    for path in sorted(path for part in parts for path in (package / part).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def own_formats() -> list[tuple[str, RowFormat]]:
    """Return the row formats from outside the package."""
    return [(name, row_format) for name, row_format in FORMATS.items() if name not in Format.__members__]


def _source_digest(row_format: RowFormat) -> str | None:
    """Return the digest of the file that a format is read by; None where there is none, as in a notebook."""
    try:
        path = inspect.getsourcefile(inspect.unwrap(row_format.read))
        return None if path is None else hashlib.blake2b(Path(path).read_bytes()).hexdigest()
    except (TypeError, OSError):
        return None


def _read(entry: Path, report_damage: bool = False) -> tuple[Samples, Audit] | None:
    """Return the content of an entry; None where there is no entry, or its content is not what was written."""
    try:
        if not entry.is_dir():
            return None
        counts = json.loads((entry / COUNTS).read_text())
        samples = Samples.mapped(entry)
        if samples.fingerprint != counts.pop("fingerprint"):
            raise ValueError("its checksum is another")
        return samples, Audit(**counts)
    except (OSError, ValueError, TypeError, KeyError, EOFError) as error:
        if report_damage:
            log.warning("%s is damaged (%s): tokenising again", entry, error)
        return None


@contextmanager
def _alone(entry: Path) -> Iterator[bool]:
    """Keep all other processes from work on the entry; yield whether one was waited for. Raises OSError."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    with entry.with_suffix(".lock").open("a") as file:
        waited = False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waited = True
            log.info("another process is tokenising the same rows: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield waited


def _make_and_keep(
    config: DataConfig, split: str, tokenizer: PreTrainedTokenizerBase, entry: Path
) -> tuple[Samples, Audit]:
    started = time.perf_counter()
    samples, audit = make_samples(config, split, tokenizer)
    seconds = time.perf_counter() - started
    if entry_name(config, split, tokenizer) != entry.name:
        log.warning("%s rows: the data changed while it was read, so tokens are not kept", split)
        return samples, audit
    partial = entry.with_suffix(".partial")
    try:
        for leftover in (partial, entry):
            if leftover.exists():
                shutil.rmtree(leftover)
        partial.mkdir()
        samples.save(partial)
        # The files are not synced to the disk: what a power cut leaves behind fails the checksum.
        (partial / COUNTS).write_text(json.dumps(asdict(audit) | {"fingerprint": samples.fingerprint}))
        partial.rename(entry)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        log.warning("%s: %s, so tokens are not kept", entry, error)
        return samples, audit
    log.info("%s rows: tokenised in %.1f s, kept in %s (%.1f MiB)", split, seconds, entry, _mebibytes(entry))
    return Samples.mapped(entry), audit


def _mebibytes(entry: Path) -> float:
    return sum(path.stat().st_size for path in entry.rglob("*") if path.is_file()) / 2**20
