"""Rows of data sets that `datasets` loads: those of the Hugging Face hub, and folders of their shape.

`datasets` reads a file as a whole, so one row that it cannot take ends the reading without a place. Files that we read
as well are then read on row by row, which names the row, or skips it.
"""

import logging
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

from lightning_peft.data.config import DataConfig
from lightning_peft.data.conversation import BadRow, Row, without_absent_keys
from lightning_peft.data.files import COMPRESSIBLE, DataFile, read_rows

log = logging.getLogger(__name__)


def hub_rows(config: DataConfig, split: str) -> Iterator[Row | BadRow]:
    """Iterate over the rows of a split, those that cannot be read as the error they are.

    Raises ValueError for a data set that is not there, or cannot be read on.
    """
    name, count = f"{config.hub_name} {hub_split(config, split)}", 0
    try:
        for values in _loaded(config, split):
            yield Row(without_absent_keys(values), f"{name} row {count + 1}")
            count += 1
        return
    except Exception as error:  # `datasets` raises what its readers and the network do
        failure = error
    files = _files(config, split, failure)
    log.warning("%s: %s; its files are read row by row", name, _reason(failure))
    yield from islice(chain.from_iterable(map(read_rows, files)), count, None)


def hub_identity(config: DataConfig, split: str) -> Any:
    """Return what tells the rows of a split from others, fit for JSON. Raises ValueError as `hub_rows` does."""
    try:
        return _loaded(config, split)._fingerprint  # it covers the files and what was done to them
    except Exception as error:
        return [file.identity() for file in _files(config, split, error)]


def hub_split(config: DataConfig, split: str) -> str | None:
    return {"train": config.hub_split, "validation": config.hub_validation_split}[split]


def check_named(config: DataConfig) -> None:
    """Raise ValueError where no data set is named."""
    if config.hub_name is None:
        raise ValueError(
            "data.hub_name=null: give the name of a data set on the hub, or data=jsonl data.train_path=FILE"
        )


def _loaded(config: DataConfig, split: str) -> Any:
    from datasets import load_dataset  # takes two seconds, and only parquet and the hub need it

    assert config.hub_name is not None, "check_named"
    return load_dataset(config.hub_name, config.hub_config, split=hub_split(config, split), streaming=config.streaming)


def _files(config: DataConfig, split: str, failure: Exception) -> list[DataFile]:
    """Return the files of a split, if all can be read row by row. Raises ValueError for the failure."""
    if isinstance(failure, OSError):
        raise ValueError(
            f"data.hub_name={config.hub_name}: not found or the hub cannot be reached ({_reason(failure)}); "
            "without network give data=jsonl data.train_path=FILE or data=text_to_sql"
        ) from failure
    paths = list(_paths(config, hub_split(config, split)))
    files = [DataFile(path) for path in paths]
    if not files or any(file.suffixes[0] not in COMPRESSIBLE for file in files):
        options = f"data.hub_name={config.hub_name} data.hub_config={config.hub_config}"
        raise ValueError(f"{options} split {hub_split(config, split)}: {_reason(failure)}") from failure
    return files


def _paths(config: DataConfig, split: str | None) -> Iterable[str]:
    """Return the paths and URLs of a split's files; none where `datasets` reads them in a way of their own."""
    from datasets import load_dataset_builder

    try:
        options = load_dataset_builder(str(config.hub_name), config.hub_config).config
    except Exception as error:  # the failure is told, and has the same cause
        log.debug("%s: %s", config.hub_name, error)
        return ()
    is_usual = getattr(options, "sep", ",") == "," and getattr(options, "field", None) is None
    return map(str, (options.data_files or {}).get(split, ()) if is_usual else ())


def _reason(error: Exception) -> str:
    """Return an error's words on one line, or those of its cause for an error while rows are generated."""
    told = error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error
    text = " ".join(str(told).split()) or type(told).__name__
    return text if len(text) <= 200 else text[:197] + "..."
