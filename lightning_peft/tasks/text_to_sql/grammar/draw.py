"""Parts of a query (tables, columns, conditions, aggregates), drawn from one schema with the words for them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from lightning_peft.tasks.text_to_sql.grammar import phrasings
from lightning_peft.tasks.text_to_sql.grammar.database_schema import Column, RowsByTable, Schema, Table, Value
from lightning_peft.tasks.text_to_sql.grammar.phrasings import Wording

T = TypeVar("T")
NUMBERS = ("integer", "real")
RANGES = ("integer", "real", "year", "date")


class Unavailable(Exception):
    """This schema has nothing to draw this part from."""


@dataclass(frozen=True)
class Query:
    """The SQL, the words that its phrasing asks for, and what a valid draw must fulfil."""

    sql: str
    words: dict[str, str]
    simpler: tuple[str, ...] = ()
    """SQL that ignores a part of the question: its result must differ, so that every part counts."""
    sort_keys: str | None = None
    """SQL for the sort keys of all candidates in order: a tie among the first `limit` + 1 makes the order ambiguous."""
    limit: int | None = None


@dataclass(frozen=True)
class Condition:
    """The words after WHERE, and those after the noun in the question."""

    sql: str
    words: str
    parts: tuple[str, ...] = ()
    """SQL of the conditions of a compound."""


def with_article(words: str) -> str:
    """Return `a singer`, `an album`, `a university`."""
    vowel = words[0] in "aeiou" and not words.startswith("uni")
    return f"an {words}" if vowel else f"a {words}"


def names(columns: Sequence[Column], prefix: str = "") -> str:
    """Return the columns as they stand after SELECT."""
    return ", ".join(prefix + column.name for column in columns)


def column_words(columns: Sequence[Column]) -> dict[str, str]:
    """Return words for the columns to show."""
    return {"columns": " and ".join(column.words for column in columns), "is": "is" if len(columns) == 1 else "are"}


def thing_words(table: Table) -> dict[str, str]:
    """Return words for the table in question."""
    return {"thing": table.singular, "things": table.plural, "a_thing": with_article(table.singular)}


def family_words(parent: Table, child: Table) -> dict[str, str]:
    """Return words for a child table in question and its parent."""
    words = {"parent": parent.singular, "parents": parent.plural, "a_parent": with_article(parent.singular)}
    return {**words, **thing_words(child)}


def order_by(expression: str, direction: str) -> str:
    """Return ORDER BY; ASC is left out."""
    return f"ORDER BY {expression} DESC" if direction == "DESC" else f"ORDER BY {expression}"


def join(parent: Table, child: Table) -> str:
    """Return FROM the child joined to its parent."""
    return f"FROM {child.name} JOIN {parent.name} ON {child.name}.{parent.name}_id = {parent.name}.id"


class Draw:
    """Draws from one schema, its rows and the wordings of one split."""

    def __init__(self, rng: random.Random, schema: Schema, rows: RowsByTable, held_out: bool) -> None:
        self.rng = rng
        self.schema = schema
        self.rows = rows
        self.held_out = held_out

    def phrase(self, wording: Wording) -> str:
        return self.rng.choice(wording.held_out if self.held_out else wording.train)

    def one(self, options: Sequence[T]) -> T:
        """Return a random member; raises Unavailable if there is none."""
        if not options:
            raise Unavailable
        return self.rng.choice(options)

    def table(self) -> Table:
        return self.one(self.schema.tables)

    def link(self) -> tuple[Table, Table]:
        """Return a (parent, child) pair."""
        return self.one(self.schema.children())

    def direction(self) -> str:
        return self.rng.choice(["DESC", "ASC"])

    def column(self, table: Table, *kinds: str, exclude: Sequence[Column] = ()) -> Column:
        """Return a column of these kinds."""
        return self.one([column for column in table.of_kind(*kinds) if column not in exclude])

    def columns(self, table: Table, most: int = 2, exclude: Sequence[Column] = ()) -> list[Column]:
        """Return one to `most` columns to show, the label more often than others."""
        options = [column for column in table.columns if column not in exclude]
        labels = [column for column in options if column.kind == "label"]
        first = self.rng.choice(labels) if labels and self.rng.random() < 0.5 else self.one(options)
        rest = [column for column in options if column != first]
        if most > 1 and rest and self.rng.random() < 0.35:
            return [first, self.rng.choice(rest)]
        return [first]

    def values(self, table: Table, column: Column) -> list[Value]:
        return [row[column.name] for row in self.rows[table.name]]

    def aggregate(self, table: Table) -> tuple[str, str, Column]:
        """Return the function, its word and the column."""
        column = self.column(table, "integer", "real", "year")
        function = self.rng.choice(["min", "max"] if column.kind == "year" else ["avg", "sum", "min", "max"])
        return function, self.rng.choice(phrasings.AGGREGATES[function]), column

    def condition(self, table: Table, prefix: str = "", exclude: Sequence[Column] = ()) -> Condition:
        """Return one comparison of a column with a value that occurs in it."""
        column = self.column(table, "category", *RANGES, exclude=exclude)
        value = self.rng.choice(self.values(table, column))
        if column.kind == "category":
            operator = key = self.rng.choice(["=", "=", "=", "=", "!="])
        elif column.kind == "date":
            operator = self.rng.choice([">", "<"])
            key = f"date {operator}"
        else:
            operator = key = self.rng.choice([">", "<", ">", "<", ">=", "<="])
        literal = f"'{value}'" if isinstance(value, str) else str(value)
        return Condition(f"{prefix}{column.name} {operator} {literal}", self._words(key, column, value))

    def between(self, table: Table) -> Condition:
        """Return a column between two values that occur in it, with at least one value between them."""
        column = self.column(table, "integer", "real", "year")
        values = sorted(set(self.values(table, column)), key=float)
        if len(values) < 4:
            raise Unavailable
        start = self.rng.randrange(len(values) - 3)
        low, high = values[start], values[start + self.rng.randint(2, len(values) - start - 1)]
        return Condition(f"{column.name} BETWEEN {low} AND {high}", self._words("between", column, low, high))

    def like(self, table: Table) -> Condition:
        """Return a label that starts with, ends with or contains one or two letters."""
        column = self.column(table, "label")
        word = self.rng.choice(str(self.rng.choice(self.values(table, column))).split())
        key = self.rng.choice(["starts", "contains", "ends"])
        if key == "starts":
            value, pattern = word[:1], f"{word[:1]}%"
        elif key == "ends":
            value = word[-self.rng.randint(1, 2) :]
            pattern = f"%{value}"
        else:
            start = self.rng.randrange(max(1, len(word) - 2))
            value = word[start : start + 2].lower()
            pattern = f"%{value}%"
        return Condition(f"{column.name} LIKE '{pattern}'", self._words(key, column, value))

    def compound(self, table: Table, *connectives: str) -> Condition:
        """Return conditions on two different columns joined by AND or OR."""
        first = self.column(table, "category", *RANGES)
        a = self.condition(table, exclude=[column for column in table.columns if column != first])
        b = self.condition(table, exclude=[first])
        connective = self.rng.choice(connectives)
        words = f"{a.words} {connective.lower()} {b.words}"
        return Condition(f"{a.sql} {connective} {b.sql}", words, (a.sql, b.sql))

    def nested(self, table: Table) -> Condition:
        """Return A AND (B OR C)."""
        either = self.compound(table, "OR")
        both = self.condition(table)
        parts = (both.sql, f"{both.sql} AND {either.parts[0]}", f"{both.sql} AND {either.parts[1]}")
        sql = f"{both.sql} AND ({either.sql})"
        words = f"{both.words} and either {either.words}"
        return Condition(sql, words, (either.sql, f"{both.sql} AND {either.sql}", *parts))

    def _words(self, key: str, column: Column, value: Value, high: Value | None = None) -> str:
        words = self.phrase(phrasings.CONDITIONS[key])
        return words.format(column=column.words, a_column=with_article(column.words), value=value, high=high)
