"""A source of rows of one's own: the table `rows` of an SQLite database.

    lightning-peft train imports=[own_source] data=jsonl data.source=sqlite data.train_path=rows.db model=tiny

Run it where this file and the database lie, or with its folder on PYTHONPATH. Columns are read as a file's are.
"""

import hashlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from lightning_peft.data.config import DataConfig
from lightning_peft.data.conversation import Row
from lightning_peft.data.sources import SOURCES, Shard, Source


def database(config: DataConfig) -> Path:
    path = Path(str(config.train_path))
    if not path.is_file():
        raise ValueError(f"data.train_path={config.train_path}: no such database")
    return path


def shards(config: DataConfig, split: str) -> list[Shard]:
    """Return the one part that the table is read in; each call of it begins anew."""
    path = database(config)

    def read() -> Iterator[Row]:
        with sqlite3.connect(path) as connection:
            connection.row_factory = sqlite3.Row
            for number, row in enumerate(connection.execute("SELECT * FROM rows ORDER BY rowid"), start=1):
                yield Row(dict(row), f"{path} row {number}")

    return [read]


def identity(config: DataConfig, split: str) -> str:
    """Return what decides the rows: tokens are kept under it, and a run that goes on is held to it."""
    return hashlib.sha256(database(config).read_bytes()).hexdigest()


SOURCES["sqlite"] = Source(lambda config: {"train"}, shards, identity)
