"""From rows to tokenised samples, under the options for bad and too long rows."""

import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lightning_peft.data.audit import Audit, check_sample
from lightning_peft.data.batch import IGNORED_LABEL
from lightning_peft.data.chat import Encoded, encode_all
from lightning_peft.data.config import DataConfig, Format, OnBadRow, OnTooLong
from lightning_peft.data.formats import BadRow, Message, Row, RowReader, row_reader
from lightning_peft.data.sources import iterate_rows

PARTS = ("tokens", "trained", "starts")
"""Files of saved samples, each a .npy."""
ROWS_AT_ONCE = 256
"""Rows tokenised in one call, which the tokenizer spreads over the cores."""


class Samples:
    """Tokenised samples, five bytes a token, in memory or mapped from the files of `save`."""

    def __init__(self, tokens: NDArray[np.int32], trained: NDArray[np.uint8], starts: NDArray[np.int64]) -> None:
        """tokens and trained (T,): the samples one after the other; starts (S + 1,): where they begin, then T."""
        self._parts: tuple[NDArray[Any], ...] = (tokens, trained, starts)
        self.lengths: list[int] = np.diff(starts).tolist()

    @classmethod
    def of(cls, samples: Iterable[Encoded]) -> "Samples":
        tokens, trained, starts = array("i"), array("B"), array("q", [0])
        for sample in samples:
            tokens.extend(sample.input_ids)
            trained.extend(label != IGNORED_LABEL for label in sample.labels)
            starts.append(len(tokens))
        return cls(np.asarray(tokens), np.asarray(trained), np.asarray(starts))

    def save(self, folder: Path) -> None:
        for name, part in zip(PARTS, self._parts, strict=True):
            np.save(folder / f"{name}.npy", part)

    @classmethod
    def mapped(cls, folder: Path) -> "Samples":
        """The samples that were saved there, read when they are asked for. Raises OSError, EOFError or ValueError."""
        return cls(*(np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in PARTS))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Encoded:
        """Sample `index`; whether it ends or was cut is counted in the audit and not kept."""
        tokens, trained, starts = self._parts
        span = slice(starts[index], starts[index + 1])
        ids = tokens[span].tolist()
        labels = [token if kept else IGNORED_LABEL for token, kept in zip(ids, trained[span].tolist(), strict=True)]
        return Encoded(ids, labels, ends=False)

    @cached_property
    def fingerprint(self) -> str:
        """Eight hex digits that change with any token, label or boundary."""
        checksum = 0
        for part in self._parts:
            checksum = zlib.crc32(part.data, checksum)
        return f"{checksum:08x}"


def make_samples(config: DataConfig, split: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Samples, Audit]:
    """The tokenised rows of a split, of the first window of the training rows when streaming, and their counts.

    Raises `BadRow`, ValueError for options that do not fit the rows, `ChatTemplateError`, `DuplicateBosError`.
    """
    rows = iterate_rows(config, split)
    if config.streaming and split == "train":
        rows = islice(rows, config.shuffle_window)
    audit = Audit()
    return Samples.of(encode_rows(rows, config, tokenizer, audit)), audit


def encode_rows(
    rows: Iterable[Row | BadRow], config: DataConfig, tokenizer: PreTrainedTokenizerBase, audit: Audit
) -> Iterator[Encoded]:
    """Samples of the rows in their order, counted in `audit`.

    Raises `BadRow`, ValueError for options that do not fit the rows, `ChatTemplateError`, `DuplicateBosError`.
    """
    reader: RowReader | None = None
    origins: list[str] = []
    conversations = []
    for row in rows:
        audit.rows += 1
        try:
            if isinstance(row, BadRow):
                raise row
            if reader is None:
                reader = _reader(row, config)
                audit.format = reader.format.value
            conversations.append(reader(row))
            origins.append(row.origin)
        except BadRow as error:
            _refuse(error, config, audit)
        if len(conversations) == ROWS_AT_ONCE:
            yield from _encode(conversations, origins, config, tokenizer, audit)
            conversations, origins = [], []
    yield from _encode(conversations, origins, config, tokenizer, audit)


def read_conversations(
    config: DataConfig, split: str, limit: int | None = None
) -> list[tuple[dict[str, Any], list[Message]]]:
    """The first usable rows of a split, each with its messages; bad rows as `data.on_bad_row` says.

    Raises `BadRow`, ValueError for options that do not fit the rows.
    """
    reader: RowReader | None = None
    found: list[tuple[dict[str, Any], list[Message]]] = []
    for row in iterate_rows(config, split):
        if limit is not None and len(found) >= limit:
            break
        try:
            if isinstance(row, BadRow):
                raise row
            reader = reader or _reader(row, config)
            found.append((row.values, reader(row)))
        except BadRow:
            if config.on_bad_row is OnBadRow.error:
                raise
    return found


def _reader(row: Row, config: DataConfig) -> RowReader:
    reader = row_reader(row.values, config)
    if config.on_too_long is OnTooLong.split and reader.format is not Format.text:
        raise ValueError(
            f"data.on_too_long=split: only plain text can be split, these rows are {reader.format.value}; "
            "use truncate, skip or error"
        )
    return reader


def _refuse(error: BadRow, config: DataConfig, audit: Audit) -> None:
    if config.on_bad_row is OnBadRow.error:
        raise error
    audit.count_bad_row(error)


def _encode(
    conversations: list, origins: list[str], config: DataConfig, tokenizer: PreTrainedTokenizerBase, audit: Audit
) -> Iterator[Encoded]:
    for origin, encoded in zip(origins, encode_all(conversations, tokenizer), strict=True):
        try:
            for sample in _fit(encoded, origin, config, audit):
                check_sample(sample, origin, tokenizer)
                audit.count_sample(sample)
                yield sample
        except BadRow as error:
            _refuse(error, config, audit)


def _fit(sample: Encoded, origin: str, config: DataConfig, audit: Audit) -> list[Encoded]:
    """The sample in pieces of at most `data.max_length` tokens, as `data.on_too_long` says."""
    length, limit = len(sample.input_ids), config.max_length
    if length <= limit:
        return [sample]
    return TOO_LONG[config.on_too_long](sample, origin, limit, audit)


def _truncate(sample: Encoded, origin: str, limit: int, audit: Audit) -> list[Encoded]:
    return [Encoded(sample.input_ids[:limit], sample.labels[:limit], ends=False, truncated=True)]


def _split(sample: Encoded, origin: str, limit: int, audit: Audit) -> list[Encoded]:
    audit.split_long += 1
    # Pieces overlap by one token: the first of a piece is not predicted, so each token is trained once all the same.
    pieces = [
        Encoded(
            sample.input_ids[start : start + limit],
            [IGNORED_LABEL, *sample.labels[start + 1 : start + limit]],
            ends=False,
        )
        for start in range(0, len(sample.input_ids) - 1, limit - 1)
    ]
    return [*pieces[:-1], replace(pieces[-1], ends=sample.ends)]


def _skip(sample: Encoded, origin: str, limit: int, audit: Audit) -> list[Encoded]:
    audit.skipped_long += 1
    return []


def _stop(sample: Encoded, origin: str, limit: int, audit: Audit) -> list[Encoded]:
    raise ValueError(
        f"{origin}: {len(sample.input_ids)} tokens, more than data.max_length={limit}; "
        "raise it, or choose data.on_too_long=truncate or skip"
    )


TOO_LONG = {OnTooLong.truncate: _truncate, OnTooLong.split: _split, OnTooLong.skip: _skip, OnTooLong.error: _stop}
