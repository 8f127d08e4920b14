"""Rows that a Python program holds, as lines of JSON: lists of dictionaries, data sets, tables of pandas and others."""

import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import date, time
from typing import Any

from lightning_peft.strict_json import strict

TABLES = {"to_pylist": (), "to_dicts": (), "to_dict": ("records",)}
"""The methods, with their arguments, that give the rows of a table: of pyarrow, polars and pandas."""
ROW = "a row is a dictionary such as {'prompt': ..., 'completion': ...}"


def lines_of(rows: Any, name: str) -> list[str]:
    """Return each row as a line of JSON, missing values as null and dates and times as ISO text.

    `name` is the argument that errors name. Raises ValueError for an object without rows, and a value that JSON lacks.
    """
    lines = [_line(row, f"{name}[{place}]") for place, row in enumerate(_each(rows, name))]
    if not lines:
        raise ValueError(f"{name}: none are given; {ROW}")
    return lines


def _each(rows: Any, name: str) -> Iterator[Any]:
    if isinstance(rows, Mapping):
        keys = ", ".join(map(repr, list(rows)[:3]))
        raise ValueError(f"{name}: is one {type(rows).__name__} of {keys}; give a list of rows, or one of its splits")
    if hasattr(rows, "columns"):
        method = next((method for method in TABLES if hasattr(rows, method)), None)
        if method is not None:
            rows = getattr(rows, method)(*TABLES[method])
    if not isinstance(rows, Iterable):
        raise ValueError(f"{name}={rows!r}: is no list; {ROW}")
    return iter(rows)


def _line(row: Any, place: str) -> str:
    if not isinstance(row, Mapping):
        raise ValueError(f"{place}={_short(row)}: is a {type(row).__name__}; {ROW}")
    values = {}
    for key, value in row.items():
        try:
            values[key] = json.loads(json.dumps(strict(value), default=_plain))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{place}[{key!r}]={_short(value)}: {error}; give text, numbers, lists or dicts"
            ) from error
    return json.dumps(strict(values), ensure_ascii=False)


def _plain(value: Any) -> Any:
    """Return the nearest value that JSON has. Raises TypeError without any."""
    if isinstance(value, date | time):  # a datetime is a date too
        return value.isoformat() if value == value else None  # NaT of pandas does not equal itself
    if hasattr(value, "tolist"):  # numbers and arrays of numpy, tensors
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is nothing that JSON has")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
