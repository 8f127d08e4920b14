"""Files of rows: on disk or behind an fsspec URL, one or many, compressed or not."""

import bz2
import csv
import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, time
from functools import partial
from pathlib import Path
from typing import IO, Any

from lightning_peft.data.conversation import BadRow, Row, read_json, without_absent_keys
from lightning_peft.data.other_files import (
    OTHER_FILES,
    refuse_one_object,
    refuse_other_content,
    refuse_other_separator,
)
from lightning_peft.data.records import elements, records
from lightning_peft.data.remote import remote
from lightning_peft.readable import first_line


class NoSuchRows(ValueError):
    """Says that a file of rows is not there, or not to be reached, now."""


@dataclass(frozen=True)
class DataFile:
    """A file of rows by its path, or by its URL where it is not on this machine's disks."""

    path: str

    def __str__(self) -> str:
        return self.path

    @property
    def suffixes(self) -> tuple[str, str]:
        """Return the endings that name the format and the compression, in lower case; "" for none."""
        name = Path(self.path.split("?")[0] if self.is_page else self.path)
        packed = name.suffix.lower() if name.suffix.lower() in DECOMPRESSED else ""
        return (Path(name.stem) if packed else name).suffix.lower(), packed

    @property
    def is_remote(self) -> bool:
        return "://" in self.path

    @property
    def is_page(self) -> bool:
        """Return whether a web server has the file; its URL may end in a query, as signed ones do."""
        return self.path.startswith(("http://", "https://"))

    def open(self) -> Any:
        """Open the file as it is stored. Raises OSError."""
        if not self.is_remote:
            return Path(self.path).open("rb")
        system, path = remote(self.path)
        return io.BufferedReader(system.open(path, "rb"), 2**20)  # fsspec's own reading by line seeks, and is slow

    @contextmanager
    def content(self) -> Iterator[IO[bytes]]:
        """Open the file, decompressed. Raises OSError."""
        packed = self.suffixes[1]
        with self.open() as stored:
            if not packed:
                yield stored
                return
            with DECOMPRESSED[packed](stored) as content:
                yield content

    def size(self) -> int | None:
        """Return the number of bytes; None where the server does not tell. Raises NoSuchRows for one out of reach."""
        if not self.is_remote:
            return Path(self.path).stat().st_size
        system, path = remote(self.path)
        try:
            return system.size(path)
        except Exception as error:  # a file system raises what its service does
            raise NoSuchRows(f"{self.path}: cannot be reached ({first_line(error.__cause__ or error)})") from error

    def identity(self) -> str:
        """Return what changes with the file's content: its digest, or what a remote system tells of it."""
        try:
            if self.is_remote and not self.is_page:  # what fsspec knows of a page is its URL
                system, path = remote(self.path)
                return f"{self.path} {system.ukey(path)}"
            digest = hashlib.blake2b()
            with self.open() as file:
                while block := file.read(2**20):
                    digest.update(block)
            return f"{self.path} {digest.hexdigest()}"
        except Exception as error:
            raise self.unreadable(error) from error

    def unreadable(self, error: Exception) -> Exception:
        """Return an error of disk, packing or service as a ValueError that names the file; any other as it is."""
        kinds = (OSError, EOFError, zlib.error, lzma.LZMAError)
        if isinstance(error, ValueError) or not (self.is_remote or isinstance(error, kinds)):
            return error
        return ValueError(f"{self}: cannot be read ({first_line(error)})")


def _zstandard(file: IO[bytes]) -> IO[bytes]:
    import pyarrow  # takes half a second, and has the format that Python itself has from 3.14 on

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd"))


DECOMPRESSED: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _zstandard,
}


def read_rows(file: DataFile) -> Iterator[Row | BadRow]:
    """Iterate over the rows of a file, those that cannot be read as the error they are.

    Raises ValueError for a file that cannot be read on.
    """
    try:
        if file.suffixes[0] in COMPRESSIBLE:
            with file.content() as content:
                refuse_other_content(content.read(8), str(file))
        yield from FILE_READERS[file.suffixes[0]](file)
    except Exception as error:  # a service raises what it likes
        raise file.unreadable(error) from error


def _read_json_lines(file: DataFile) -> Iterator[Row | BadRow]:
    with file.content() as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _json_row(line, f"{file} line {number}")


def _json_row(line: bytes, origin: str) -> Row | BadRow:
    try:
        return _text_row(line.decode("utf-8-sig").strip(), origin)
    except UnicodeDecodeError:
        return BadRow(origin, "UTF-8 text", line)


def _text_row(text: str, origin: str) -> Row | BadRow:
    try:
        values = read_json(text)
    except json.JSONDecodeError as error:
        return BadRow(origin, f"a JSON object ({error.msg}, column {error.colno})", text)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets in brackets in brackets
        return BadRow(origin, f"a JSON object ({error})", text)
    return Row(values, origin) if isinstance(values, dict) else BadRow(origin, "a JSON object", values)


def _read_json(file: DataFile) -> Iterator[Row | BadRow]:
    """Read the objects of one JSON array, or a file that starts otherwise as JSON lines, which are often named so."""
    with file.content() as content:
        start = content.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
        if start.startswith(b"["):
            # Bytes of another encoding become lone surrogates, by which their rows are found.
            text = (start + content.read()).decode("utf-8-sig", errors="surrogateescape")
    if not start.startswith(b"["):
        with file.content() as content:
            refuse_one_object(content, str(file))
        yield from _read_json_lines(file)
        return
    try:
        rows = read_json(text)
    except (ValueError, RecursionError) as error:
        yield from _array_row_by_row(text, file, error)
        return
    for number, values in enumerate(rows, start=1):
        origin = f"{file} row {number}"
        if not isinstance(values, dict):
            yield BadRow(origin, "a JSON object", values)
        else:
            yield _utf8_row(values, origin)


def _array_row_by_row(text: str, file: DataFile, wrong: Exception) -> Iterator[Row | BadRow]:
    """Read an array element by element, as some cannot be read. Raises ValueError where their ends cannot be told."""
    try:
        texts = list(elements(text))
    except ValueError:
        place, reason = f"{file}", f"{wrong}"
        if isinstance(wrong, json.JSONDecodeError):
            place, reason = f"{file} line {wrong.lineno}", f"{wrong.msg}, column {wrong.colno}"
        raise ValueError(f"{place}: not JSON ({reason})") from wrong
    for number, element in enumerate(texts, start=1):
        row = _text_row(element, f"{file} row {number}")
        yield _utf8_row(row.values, row.origin) if isinstance(row, Row) else row


def _utf8_row(values: dict[str, Any], origin: str) -> Row | BadRow:
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return BadRow(origin, "UTF-8 text", error.object[max(0, error.start - 20) : error.end + 20])
    except RecursionError as error:
        return BadRow(origin, f"a JSON object ({error})", list(values), None)
    return Row(values, origin)


def _read_table(file: DataFile, separator: str) -> Iterator[Row | BadRow]:
    csv.field_size_limit(sys.maxsize)  # the default of 128 KiB is below a long document
    with (
        file.content() as content,
        io.TextIOWrapper(content, encoding="utf-8-sig", errors="surrogateescape", newline="") as text,
    ):
        found = records(text, separator, str(file))
        header = next(found, None)
        names = [] if header is None else header.fields
        if header is not None and header.wrong is not None:
            raise ValueError(f"{file} line 1: not CSV ({header.wrong})")
        _refuse_copies(names, f"{file} line 1")
        refuse_other_separator(names, separator, f"{file} line 1")
        for record in found:
            origin = f"{file} {record.place}"
            if record.wrong is not None:
                yield BadRow(origin, f"CSV ({record.wrong})", record.text)
            elif len(record.fields) not in (0, len(names)):
                yield BadRow(origin, f"{len(names)} fields", len(record.fields))
            elif record.fields:  # a line without any is between rows
                yield _utf8_row(dict(zip(names, record.fields, strict=True)), origin)


def _refuse_copies(names: Iterable[Any], origin: str) -> None:
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{origin}: the column {', '.join(map(repr, repeated))} is there more than once; rename one")


def _read_parquet(file: DataFile) -> Iterator[Row | BadRow]:
    import pyarrow.parquet  # takes a second, and only parquet and the hub need it

    try:
        with file.open() as content:
            opened = pyarrow.parquet.ParquetFile(content)
            empty, names = opened.metadata.num_rows == 0, opened.schema_arrow.names
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: not a parquet file ({first_line(error)})") from error
    _refuse_copies(names, str(file))
    if empty:
        raise ValueError(f"{file}: holds no rows")
    yield from _read_by_datasets(file, "parquet")


def _read_by_datasets(file: DataFile, kind: str) -> Iterator[Row | BadRow]:
    from datasets import load_dataset  # takes two seconds

    try:
        rows = load_dataset(kind, data_files=file.path, split="train", streaming=True)
        for number, values in enumerate(rows, start=1):
            yield Row(without_absent_keys(values), f"{file} row {number}")
    except Exception as error:  # `datasets` raises what its readers do
        article = "an" if kind == "arrow" else "a"
        raise ValueError(f"{file}: not {article} {kind} file ({first_line(error)})") from error


def _read_excel(file: DataFile) -> Iterator[Row | BadRow]:
    """Read the only sheet that has cells; the first row names the columns, and every cell is text as in a CSV file."""
    import pandas  # takes a second

    try:
        with file.open() as content:
            sheets = pandas.read_excel(
                # "None" and "NA" are answers; what is not a number is a cell whose formula failed.
                io.BytesIO(content.read()),
                sheet_name=None,
                header=None,
                dtype=object,
                keep_default_na=False,
            )
    except ImportError as error:
        raise ValueError(f"{file}: Excel files need the package openpyxl (pip install openpyxl)") from error
    except Exception as error:  # whatever the reader of a broken file stumbles on
        raise ValueError(f"{file}: not an Excel file ({first_line(error)})") from error
    filled = {name: sheet for name, sheet in sheets.items() if len(sheet)}
    if len(filled) != 1:
        found = ", ".join(map(repr, filled)) or "none"
        raise ValueError(f"{file}: one sheet with rows is read, this file has {found}; save one alone")
    header, *rows = next(iter(filled.values())).values.tolist()
    used = [place for place in range(len(header)) if any(cells[place] != "" for cells in (header, *rows))]
    names = [str(header[place]) for place in used]  # a column that was only coloured is none
    _refuse_copies(names, f"{file} row 1")
    for number, cells in enumerate(rows, start=2):
        values = {name: cells[place] for name, place in zip(names, used, strict=True)}
        if wrong := [name for name, value in values.items() if pandas.isna(value)]:
            yield BadRow(f"{file} row {number}", "a value", "an error of the formula", wrong[0])
        elif any(value != "" for value in values.values()):  # as a line of a CSV file without any
            yield Row({name: _cell_text(value) for name, value in values.items()}, f"{file} row {number}")


def _cell_text(value: Any) -> str:
    """Return the text of a cell; Excel keeps a day as its midnight."""
    is_day = isinstance(value, datetime) and value.time() == time.min
    return str(value.date() if is_day else value)


FILE_READERS: dict[str, Callable[[DataFile], Iterator[Row | BadRow]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": partial(_read_table, separator=","),
    ".tsv": partial(_read_table, separator="\t"),
    ".parquet": _read_parquet,
    ".arrow": partial(_read_by_datasets, kind="arrow"),
    ".xlsx": _read_excel,
}
COMPRESSIBLE = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")


def find_files(option: str, value: str | list[str]) -> list[DataFile]:
    """Return the files that an option names: files, folders, patterns with `*` and `**`, or a list of such.

    The order is that of a list, and by name within a folder or pattern. Raises ValueError where one names no file,
    names a file twice, or one that is empty or of another kind.
    """
    entries = [value] if isinstance(value, str) else value
    files = [file for entry in entries for file in _files_of(f"{option}={entry}", entry)]
    if twice := [str(file) for file, count in Counter(files).items() if count > 1]:
        raise ValueError(f"{option}={value}: {', '.join(twice)} would be read more than once")
    for file in files:
        if not file.is_remote and not Path(file.path).exists():
            raise ValueError(f"{option}={value}: {file} is a link to a file that is not there")
        kind, packed = file.suffixes
        if kind not in FILE_READERS or (packed and kind not in COMPRESSIBLE):
            said = (
                f"{option}={value}: {Path(file.path).name} must end in {', '.join(FILE_READERS)}, the text ones also "
            )
            raise ValueError(f"{said}in {', '.join(DECOMPRESSED)} after that{OTHER_FILES.get(kind, '')}")
        if file.size() == 0:
            raise ValueError(f"{option}={value}: {file} is empty")
    return files


def _files_of(given: str, entry: str) -> list[DataFile]:
    if "://" in entry:
        return _remote_files(given, entry)
    pattern = str(Path(entry).expanduser())
    if Path(pattern).is_dir():
        return _readable(given, (str(path) for path in Path(pattern).rglob("*") if not path.is_dir()), pattern)
    found = [pattern] if os.path.lexists(pattern) else sorted(glob.glob(pattern, recursive=True))
    files = [DataFile(path) for path in found if found == [pattern] or not Path(path).is_dir()]
    if not files:
        raise NoSuchRows(f"{given}: there is no such file (working folder {Path.cwd()})")
    return files


def _remote_files(given: str, entry: str) -> list[DataFile]:
    system, path = remote(entry)
    try:
        if DataFile(entry).is_page and not path.endswith("/"):  # its size says whether it is there, and else why not
            return [DataFile(entry)]
        if system.isdir(path):
            found = sorted(system.find(path))
            return _readable(given, map(system.unstrip_protocol, found), system.unstrip_protocol(path))
        if system.exists(path):
            found = [path]
        else:  # a pattern, or nothing
            found = [name for name in sorted(system.glob(path)) if not system.isdir(name)]
    except Exception as error:  # no credentials, no network, no such bucket
        raise NoSuchRows(f"{given}: cannot be reached ({first_line(error)})") from error
    if not found:
        raise NoSuchRows(f"{given}: there is no such file")
    return [DataFile(system.unstrip_protocol(name)) for name in found]


def _readable(given: str, paths: Iterable[str], folder: str) -> list[DataFile]:
    """Return a folder's files, hidden ones and its description left out. Raises ValueError for others than rows."""
    inside = {path: path.removeprefix(folder).strip("/").split("/") for path in paths}
    shown = [path for path, parts in sorted(inside.items()) if not any(part.startswith((".", "_")) for part in parts)]
    described = [path for path in shown if Path(path).name.upper().split(".")[0] in ("README", "LICENSE", "NOTICE")]
    if any(Path(path).name == "dataset_info.json" for path in shown):
        raise ValueError(f"{given}: a data set that `datasets` saved; give data=hub data.hub_name={folder}")
    files = [DataFile(path) for path in shown if path not in described]
    if not files:
        raise ValueError(f"{given}: the folder holds no files of rows")
    return files
