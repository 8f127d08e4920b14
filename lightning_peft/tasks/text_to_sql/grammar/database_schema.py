"""Schemas of the text-to-SQL data: drawn from the vocabulary, written as one line, filled with rows."""

import datetime
import random
from dataclasses import dataclass

from lightning_peft.tasks.text_to_sql.grammar import domains

Value = str | int | float
RowsByTable = dict[str, list[dict[str, Value]]]
"""Rows of each table, by table name."""

FIRST_NAMES = (
    "Ada Boris Carla Diego Elena Farid Greta Hugo Irene Jonas Kira Liam Mona Nils Olga Pablo Quinn Rosa Stefan "
    "Tara Umar Vera Wanda Yusuf Zoe"
).split()
LAST_NAMES = (
    "Adler Banks Castro Duval Evans Fischer Grant Haas Ito Jansen Keller Lopez Moreau Novak Osman Park Quist "
    "Rossi Silva Tanner Ueda Vogel Weber Young"
).split()
ADJECTIVES = (
    "Amber Bold Calm Distant Early Frozen Golden Hidden Iron Jolly Kind Lost Misty Noble Open Pale Quiet Rapid "
    "Silver Tiny Urban Velvet Wild Young"
).split()
NOUNS = (
    "Anchor Bell Crown Dawn Echo Flame Garden Harbor Island Jewel Key Lantern Mirror Needle Orchard Path Quarry "
    "Ribbon Shadow Tower Valley Willow"
).split()
PLACES = (
    "Ash Birch Clear Deer East Fair Glen High Iron King Lake Maple North Oak Pine Red South Stone Thorn Upper "
    "West White Winter Wolf"
).split()
PLACE_ENDINGS = (
    "bridge brook bury dale field ford gate ham haven hill land mouth port shore stead ton view ville wick wood"
).split()


CODE_LETTERS = "AX BK CT DR EL FM GP HN KS LV MZ NB PQ RT SW TY".split()
LABELS = {
    "person": [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES],
    "thing": [f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS],
    "place": [place + ending for place in PLACES for ending in PLACE_ENDINGS],
    "code": [f"{letters}{number}" for letters in CODE_LETTERS for number in range(10, 100)],
}


@dataclass(frozen=True)
class Column:
    """One column; `values` is its list of categories or its (low, high) bounds as text."""

    name: str
    kind: str
    """label, category, integer, year, real or date."""
    values: tuple[str, ...]

    @property
    def words(self) -> str:
        """Return the name as it stands in a question."""
        return self.name.replace("_", " ")


@dataclass(frozen=True)
class Table:
    """One table; every table has an `id`, and `<parent>_id` where it has a parent."""

    name: str
    parent: str | None
    columns: tuple[Column, ...]

    @property
    def singular(self) -> str:
        return self.name.replace("_", " ")

    @property
    def plural(self) -> str:
        words = self.singular
        if words.endswith(("s", "x", "z", "ch", "sh")):
            return words + "es"
        if words.endswith("y") and words[-2] not in "aeiou":
            return words[:-1] + "ies"
        return words + "s"

    def of_kind(self, *kinds: str) -> list[Column]:
        return [column for column in self.columns if column.kind in kinds]

    @property
    def column_names(self) -> list[str]:
        """Return all names in the order of the database: id, the columns, the foreign key."""
        foreign_key = [f"{self.parent}_id"] if self.parent else []
        return ["id", *(column.name for column in self.columns), *foreign_key]


@dataclass(frozen=True)
class Schema:
    """Tables, parents before their children."""

    tables: tuple[Table, ...]

    def line(self) -> str:
        """Return the prompt's line: `singer(id, name) | album(id, title, singer_id)`; `parse_schema` reads it back."""
        return " | ".join(f"{table.name}({', '.join(table.column_names)})" for table in self.tables)

    def create_statements(self) -> list[str]:
        """Return one CREATE TABLE for each table, with its foreign key."""
        types = {"integer": "INTEGER", "year": "INTEGER", "real": "REAL"}
        statements = []
        for table in self.tables:
            parts = ["id INTEGER PRIMARY KEY", *(f"{c.name} {types.get(c.kind, 'TEXT')}" for c in table.columns)]
            if table.parent:
                parts.append(f"{table.parent}_id INTEGER REFERENCES {table.parent}(id)")
            statements.append(f"CREATE TABLE {table.name} ({', '.join(parts)})")
        return statements

    def children(self) -> list[tuple[Table, Table]]:
        """Return every (parent, child) pair."""
        by_name = {table.name: table for table in self.tables}
        return [(by_name[table.parent], table) for table in self.tables if table.parent]


def _parse_column(text: str) -> Column:
    name, _, values = text.strip().partition("=")
    if values in ("person", "thing", "place", "code"):
        return Column(name, "label", (values,))
    if values == "date":
        return Column(name, "date", ())
    if "/" in values:
        return Column(name, "category", tuple(values.split("/")))
    low, high = values.split("-")
    kind = "real" if "." in values else "year" if name.endswith("year") else "integer"
    return Column(name, kind, (low, high))


def _parse_domains(text: str) -> list[tuple[Table, ...]]:
    domains = []
    for block in text.strip().split("\n\n"):
        tables = []
        for line in block.splitlines():
            head, _, columns = line.partition(":")
            name, _, parent = head.partition(" > ")
            tables.append(Table(name, parent or None, tuple(_parse_column(part) for part in columns.split(","))))
        domains.append(tuple(tables))
    return domains


DOMAINS = {
    "train": _parse_domains(domains.TRAIN),
    "validation": _parse_domains(domains.VALIDATION),
    "test": _parse_domains(domains.TEST),
}
TABLES = {table.name: table for domains in DOMAINS.values() for tables in domains for table in tables}


def draw_schema(rng: random.Random, split: str) -> Schema:
    """Return two or three tables of one domain of the split, each with two to four of its columns."""
    tables = rng.choice(DOMAINS[split])
    if rng.random() < 0.7:
        tables = tables[:2]
    chosen = []
    for table in tables:
        count = rng.randint(2, 3) if len(tables) == 3 else rng.randint(2, 4)
        picked = sorted(rng.sample(range(len(table.columns)), min(count, len(table.columns))))
        if table.columns[0].kind == "label" and 0 not in picked:
            picked[0] = 0
        chosen.append(Table(table.name, table.parent, tuple(table.columns[i] for i in picked)))
    return Schema(tuple(chosen))


def parse_schema(line: str) -> Schema:
    """Return the schema that `Schema.line` wrote; raises ValueError on a table or column outside the vocabulary."""
    tables = []
    for part in line.split(" | "):
        name, _, columns = part.rstrip(")").partition("(")
        if name not in TABLES:
            raise ValueError(f"schema={line!r}: table {name!r} is not in the text_to_sql vocabulary")
        known = {column.name: column for column in TABLES[name].columns}
        parent = TABLES[name].parent
        names = [column for column in columns.split(", ") if column not in ("id", f"{parent}_id")]
        if unknown := [column for column in names if column not in known]:
            raise ValueError(f"schema={line!r}: table {name!r} has the columns {list(known)}, not {unknown}")
        tables.append(Table(name, parent, tuple(known[column] for column in names)))
    return Schema(tuple(tables))


def _distinct_numbers(rng: random.Random, low: int, high: int, count: int) -> list[int]:
    if high - low + 1 >= count:
        return rng.sample(range(low, high + 1), count)
    return rng.choices(range(low, high + 1), k=count)


def _fill_column(rng: random.Random, column: Column, count: int) -> list[Value]:
    if column.kind == "label":
        return list(rng.sample(LABELS[column.values[0]], count))
    if column.kind == "category":
        # Each database leaves out at least one category, so that the distinct values differ between databases.
        present = rng.sample(column.values, rng.randint(max(2, len(column.values) - 2), len(column.values) - 1))
        return list(rng.choices(present, k=count))
    if column.kind == "date":
        first = datetime.date(2005, 1, 1).toordinal()
        return [datetime.date.fromordinal(first + day).isoformat() for day in rng.sample(range(7000), count)]
    low, high = column.values
    if column.kind == "real":
        return [value / 10 for value in _distinct_numbers(rng, round(float(low) * 10), round(float(high) * 10), count)]
    return list(_distinct_numbers(rng, int(low), int(high), count))


def fill(schema: Schema, seed: int) -> RowsByTable:
    """Return the rows of every table, a function of (schema, seed); some parents have no child."""
    rng = random.Random(seed)
    rows: RowsByTable = {}
    for depth, table in enumerate(schema.tables):
        count = rng.randint(7, 10) if depth == 0 else rng.randint(11, 15)
        columns: dict[str, list[Value]] = {"id": list(range(1, count + 1))}
        for column in table.columns:
            columns[column.name] = _fill_column(rng, column, count)
        if table.parent:
            parents = len(rows[table.parent])
            with_children = rng.sample(range(1, parents + 1), max(2, parents * 3 // 4))
            columns[f"{table.parent}_id"] = list(rng.choices(with_children, k=count))
        rows[table.name] = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return rows
