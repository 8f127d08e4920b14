"""A table of named rows that a terminal of any width shows whole: without room for its columns, each row has lines."""

import os
import shutil
import sys
from collections.abc import Sequence

from rich.box import SIMPLE
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

ENDLESS = 100_000

TableRows = Sequence[tuple[str, Sequence[str]]]
"""The name of each row, and its values."""


def print_rows(heading: str, columns: Sequence[str], rows: TableRows, title: str | None = None) -> None:
    """Print each row's name and its values under `columns`, words to the left and numbers to the right.

    Nothing is cut off: where a line has no room for name and values, the values stand below the name, and where a line
    has none for the values, each comes with its heading. A pipe has every row on one line, as nothing there has a
    width; COLUMNS gives a pipe one.
    """
    has_width = sys.stdout.isatty() or "COLUMNS" in os.environ
    width = shutil.get_terminal_size().columns if has_width else ENDLESS
    made = rows_as_table(heading, columns, rows, title)
    console = Console(width=width, markup=False)  # a value in brackets is none
    if console.measure(made, options=console.options.update(max_width=ENDLESS)).maximum <= width:
        console.print(made)
        return
    lines = values_below_names(columns, rows)
    if max(cell_len(line) for line in lines if line.startswith(" ")) > width:
        lines = values_with_headings(columns, rows, width)
    print("\n".join([*([] if title is None else [title]), *lines]))


def rows_as_table(heading: str, columns: Sequence[str], rows: TableRows, title: str | None) -> Table:
    made = Table(box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False, title=title)
    made.add_column(heading)
    for index, column in enumerate(columns):
        made.add_column(column, no_wrap=True, justify="left" if are_words(rows, index) else "right")
    for name, values in rows:
        made.add_row(name, *values)
    return made


def are_words(rows: TableRows, column: int) -> bool:
    return any(values[column][:1].isalpha() for _, values in rows)


def values_below_names(columns: Sequence[str], rows: TableRows) -> list[str]:
    """Return lines with the values of all rows in columns, each row's below its name."""
    heads = [column.split("\n") for column in columns]
    depth = max(len(head) for head in heads)
    lines = [[head[-depth + i] if len(head) >= depth - i else "" for head in heads] for i in range(depth)]
    widths = [max(cell_len(line[i]) for line in [*lines, *(v for _, v in rows)]) for i in range(len(columns))]

    def in_columns(cells: Sequence[str]) -> str:
        padded = []
        for index, cell in enumerate(cells):
            blank = " " * (widths[index] - cell_len(cell))
            padded.append(cell + blank if are_words(rows, index) else blank + cell)
        return f"  {'  '.join(padded)}".rstrip()

    found = [in_columns(line) for line in lines]
    for name, values in rows:
        found += [name, in_columns(values)]
    return found


def values_with_headings(columns: Sequence[str], rows: TableRows, width: int) -> list[str]:
    """Return for each row its name, and below it "heading value" pairs, as many to a line as there is room for."""
    lines = []
    for name, values in rows:
        lines.append(name)
        line = ""
        for column, value in zip(columns, values, strict=True):
            pair = f"{' '.join(column.split())} {value}"
            if line and cell_len(line) + cell_len(pair) + 3 > width:
                lines.append(f"{line},")
                line = ""
            line += f", {pair}" if line else f"  {pair}"
        lines.append(line)
    return lines
