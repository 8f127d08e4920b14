"""The records of a text, also those that cannot be read: the elements of a JSON array, the rows of a table."""

import csv
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_JSON_MARKS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{},]', re.DOTALL)
_CLOSES = {"[": "]", "{": "}"}


def elements(array: str) -> Iterator[str]:
    """Iterate over the texts of the elements of a JSON array, whatever is wrong inside one of them.

    Raises ValueError where quotes or brackets do not come in pairs, so that no later element has an end.
    """
    awaited: list[str] = []
    begin, follows = 0, False
    for match in _JSON_MARKS.finditer(array):
        mark = match[0]
        if mark in _CLOSES:
            awaited.append(_CLOSES[mark])
            begin = match.end() if len(awaited) == 1 else begin
        elif mark == '"':
            raise ValueError("a string without an end")
        elif mark in ("]", "}"):
            if not awaited or awaited.pop() != mark:
                raise ValueError(f"a {mark} that closes nothing")
        if (mark == "," and len(awaited) == 1) or not awaited:
            element = array[begin : match.start()].strip()
            if element or mark == "," or follows:
                yield element
            begin, follows = match.end(), True
        if not awaited:
            break
    if awaited or array[begin:].strip():
        raise ValueError("an array without an end, or something behind it")


class Record(NamedTuple):
    """A row of a table."""

    fields: list[str]
    first_line: int
    last_line: int
    wrong: str | None = None
    """The reason why a row without fields cannot be read."""
    text: str = ""
    """The text in the file of a row without fields."""

    @property
    def place(self) -> str:
        """Return the row's line, or all lines of one that cannot be read."""
        if self.wrong is None or self.first_line == self.last_line:
            return f"line {self.last_line}"
        return f"lines {self.first_line} to {self.last_line}"


def records(lines: Iterable[str], separator: str, name: str) -> Iterator[Record]:
    """Iterate over the rows of a table; one that is no CSV ends where its quotes have come in pairs.

    name: of the file. Raises ValueError for one whose quotes never do, so that all lines after would be its own.
    """
    held: list[str] = []
    count = 0

    def counted() -> Iterator[str]:
        nonlocal count
        for line in lines:
            held.append(line)
            count += 1
            yield line

    left = counted()
    reader = csv.reader(left, strict=True, delimiter=separator)
    while True:
        held.clear()
        first, wrong, fields = count + 1, None, []
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            wrong = str(error)
            while "".join(held).count('"') % 2:
                if next(left, None) is None:
                    raise ValueError(
                        f"{name} after line {first - 1}: not CSV in UTF-8, a quoted field has no end ({error})"
                    ) from error
        yield Record(fields, first, count, wrong, "" if wrong is None else "".join(held))
