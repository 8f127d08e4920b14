"""In-memory sqlite databases for generated schemas, on which untrusted SELECT statements run with bounds."""

import math
import sqlite3
from collections.abc import Sequence
from typing import Self

from lightning_peft.tasks.text_to_sql.grammar.database_schema import RowsByTable, Schema, fill

MAX_VM_STEPS = 500_000
"""sqlite virtual-machine steps that one query may take; a gold query takes a few thousand."""
MAX_RESULT_ROWS = 2_000
MAX_VALUE_BYTES = 2_000
"""Longest value, and longest row in a sort: with the bound on steps no query holds more than about 200 MB."""
STEPS_PER_CHECK = 10_000

ResultRow = tuple[object, ...]


class QueryError(ValueError):
    """The statement is not a SELECT, is invalid, or went over the bounds."""


def _allow_reads(action: int, *_: str | None) -> int:
    allowed = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE)
    return sqlite3.SQLITE_OK if action in allowed else sqlite3.SQLITE_DENY


class Database:
    """A schema filled with rows; after the fill nothing but SELECT and WITH is allowed."""

    def __init__(self, schema: Schema, rows: RowsByTable) -> None:
        # autocommit: a failed statement leaves no transaction open
        self._connection = sqlite3.connect(":memory:", isolation_level=None)
        self._connection.execute("BEGIN")
        for statement in schema.create_statements():
            self._connection.execute(statement)
        for table, records in rows.items():
            marks = ", ".join("?" * len(records[0]))
            self._connection.executemany(f"INSERT INTO {table} VALUES ({marks})", [tuple(r.values()) for r in records])
        self._connection.execute("COMMIT")
        self._connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
        self._connection.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 200)
        self._connection.set_authorizer(_allow_reads)
        self._checks_left = 0
        self._connection.set_progress_handler(self._out_of_steps, STEPS_PER_CHECK)

    def _out_of_steps(self) -> bool:
        self._checks_left -= 1
        return self._checks_left <= 0

    def run(self, sql: str) -> list[ResultRow]:
        """Return the rows of one SELECT statement; raises QueryError on anything else or over the bounds."""
        self._checks_left = MAX_VM_STEPS // STEPS_PER_CHECK
        try:
            cursor = self._connection.execute(sql)
            rows = cursor.fetchmany(MAX_RESULT_ROWS + 1)
            cursor.close()
        # sqlite3.Warning: two statements in one (Python 3.11); ValueError: lone surrogates, null characters
        except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError) as error:
            raise QueryError(f"sql={sql[:200]!r}: {error}") from error
        if len(rows) > MAX_RESULT_ROWS:
            raise QueryError(f"sql={sql[:200]!r}: more than {MAX_RESULT_ROWS} rows")
        return rows

    def close(self) -> None:
        self._connection.close()


class DatabasePair:
    """The two databases on which an answer must be right: the row's seed and the next one, with other rows.

    They are filled when first asked; `with` closes them.
    """

    def __init__(self, schema: Schema, seed: int) -> None:
        self._schema = schema
        self._seed = seed
        self._databases: list[Database] = []
        self.first_rows = fill(schema, seed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for database in self._databases:
            database.close()

    def run(self, sql: str) -> list[list[ResultRow]]:
        """Return the results on both; raises QueryError if one fails."""
        if not self._databases:
            for rows in (self.first_rows, fill(self._schema, self._seed + 1)):
                self._databases.append(Database(self._schema, rows))
        return [database.run(sql) for database in self._databases]


def is_ordered(sql: str) -> bool:
    """Return whether the order of the result counts; the grammar has ORDER BY at the outermost level only."""
    return " ORDER BY " in sql


def _same_value(a: object, b: object) -> bool:
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)
    return a == b


def _same_row(a: ResultRow, b: ResultRow) -> bool:
    return len(a) == len(b) and all(_same_value(x, y) for x, y in zip(a, b, strict=True))


def same_result(gold: Sequence[ResultRow], answer: Sequence[ResultRow], ordered: bool) -> bool:
    """Return whether rows are equal, as a list if `ordered`, else as a multiset; numbers within a relative 1e-6."""
    if len(gold) != len(answer):
        return False
    if ordered:
        return all(_same_row(a, b) for a, b in zip(gold, answer, strict=True))
    remaining = list(answer)
    for row in gold:
        match = next((i for i, other in enumerate(remaining) if _same_row(row, other)), None)
        if match is None:
            return False
        remaining.pop(match)
    return True
