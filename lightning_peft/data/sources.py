"""The sources of rows: files, the Hugging Face hub, or data the project makes itself."""

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, compress, count, islice
from math import ceil
from typing import Any

from lightning_peft.data.config import DataConfig, RowKind
from lightning_peft.data.conversation import BadRow, Row
from lightning_peft.data.files import DataFile, find_files, read_rows
from lightning_peft.data.hub import check_named, hub_identity, hub_rows
from lightning_peft.tasks.registry import TASKS
from lightning_peft.tasks.task import OwnRows

Shard = Callable[[], Iterator[Row | BadRow]]
"""Reads a part of a source from its beginning; rows that cannot be read come as the error they are."""


@dataclass(frozen=True)
class Source:
    """The splits that a source has of its own under the options, and the shards of one of them."""

    splits: Callable[[DataConfig], set[str]]
    """The splits of the source's own, among train, validation and test."""
    shards: Callable[[DataConfig, str], list[Shard]]
    identity: Callable[[DataConfig, str], Any]
    """The identity of a split's rows: all that decides them beside the options and our own code, fit for JSON."""


def data_files(config: DataConfig, split: str) -> list[DataFile]:
    """Return the files of a split's rows. Raises ValueError for missing or unreadable files."""
    option = f"{split}_path"
    value = getattr(config, option)
    if value is None:
        raise ValueError(f"data.{option}=null: give a JSONL, JSON, CSV or parquet file, a folder, or a pattern")
    return find_files(f"data.{option}", value)


def _file_shards(config: DataConfig, split: str) -> list[Shard]:
    return [partial(read_rows, file) for file in data_files(config, split)]


def _file_identity(config: DataConfig, split: str) -> list[str]:
    return [file.identity() for file in data_files(config, split)]


def file_count(config: DataConfig, split: str) -> int | None:
    """Return how many files the rows of a split are read from; None for a source without files."""
    if config.source != "files":
        return None
    return len(data_files(config, split if split in _source(config).splits(config) else "train"))


def _hub_shards(config: DataConfig, split: str) -> list[Shard]:
    check_named(config)
    return [partial(hub_rows, config, split)]


def _hub_identity(config: DataConfig, split: str) -> Any:
    check_named(config)
    return hub_identity(config, split)


def _numbered_rows(rows: Callable[[], Iterable[dict[str, Any]]], name: str) -> list[Shard]:
    return [lambda: (Row(values, f"{name} row {number}") for number, values in enumerate(rows(), start=1))]


def _task_source(own: OwnRows) -> Source:
    def shards(config: DataConfig, split: str) -> list[Shard]:
        limit = config.max_rows if split == "train" else config.max_validation_rows
        kind = RowKind.answers if config.rows is None else config.rows
        make = partial(own.make, split, config.split_seed, limit, kind.name)
        return _numbered_rows(make, f"{config.source} {split}")

    return Source(_all_splits, shards, lambda config, split: own.version())


def _splits_by_option(option: str) -> Callable[[DataConfig], set[str]]:
    return lambda config: {"train"} if getattr(config, option) is None else {"train", "validation"}


def _all_splits(config: DataConfig) -> set[str]:
    return {"train", "validation", "test"}


SPLITS = ("test", "validation", "train")
"""The splits in their order: one that the source does not have is taken from the next."""

SOURCES = {
    "files": Source(_splits_by_option("validation_path"), _file_shards, _file_identity),
    "hub": Source(_splits_by_option("hub_validation_split"), _hub_shards, _hub_identity),
}
"""Sources of rows from elsewhere; a task that brings rows is the source of its name."""


def _source(config: DataConfig) -> Source:
    own = {name: task.own_rows for name, task in TASKS.items() if task.own_rows is not None}
    if config.source in SOURCES:
        return SOURCES[config.source]
    if config.source not in own:
        raise ValueError(f"data.source={config.source}: must be one of {', '.join([*SOURCES, *own])}")
    return _task_source(own[config.source])


def rows_identity(config: DataConfig, split: str) -> Any:
    """Return what tells a split's rows from others that the same options could mean, fit for JSON.

    Raises ValueError for a missing or empty file or data set.
    """
    source = _source(config)
    splits = source.splits(config)
    return source.identity(config, next(name for name in SPLITS[SPLITS.index(split) :] if name in splits))


def iterate_rows(config: DataConfig, split: str, shuffle_shards: random.Random | None = None) -> Iterator[Row | BadRow]:
    """Iterate over the rows of a split in the order of the source; rows that cannot be read come as the error they are.

    `test` is `validation` where the source has no test rows; `validation` is the held-out share of the training rows
    where it has no validation rows. The choice of held-out rows depends on `data.split_seed` and their place only, so
    that no later choice of limits lets a training row into an evaluation. Raises ValueError for a missing or empty
    file or data set.
    """
    source = _source(config)
    splits = source.splits(config)
    if split == "test" and split not in splits:
        split = "validation"
    holds_out = "validation" not in splits
    if split == "validation" and holds_out and config.validation_fraction == 0:
        return iter(())
    limit = config.max_rows if split == "train" else config.max_validation_rows
    shards = list(enumerate(source.shards(config, split if split in splits else "train")))
    if shuffle_shards is not None and limit is None:
        shuffle_shards.shuffle(shards)
    parts: Iterator[Iterator[Row | BadRow]] = (shard() for _, shard in shards)
    if holds_out and config.validation_fraction > 0:
        parts = (compress(shard(), _chosen(number, split, config)) for number, shard in shards)
    return islice(chain.from_iterable(parts), limit)


def _chosen(shard: int, split: str, config: DataConfig) -> Iterator[bool]:
    """Yield for each row of a shard whether it is in the split: among the training or the held-out rows."""
    return (_is_held_out(index, shard, config) == (split == "validation") for index in count())


def _is_held_out(index: int, shard: int, config: DataConfig) -> bool:
    """Return whether a row is the random one of 1 / `data.validation_fraction` rows of a shard that is held out."""
    return index == _held_out_index(
        int(index * config.validation_fraction), shard, config.validation_fraction, config.split_seed
    )


@lru_cache(maxsize=16)
def _held_out_index(block: int, shard: int, fraction: float, seed: int) -> int:
    begin, end = ceil(block / fraction), ceil((block + 1) / fraction)
    return random.Random(f"{seed} {shard} {block}").randrange(begin, end)
