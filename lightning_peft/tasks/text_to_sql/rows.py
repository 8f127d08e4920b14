"""`data=text_to_sql`: questions about generated schemas with the SQL that answers them.

Every answer has been executed. It returns rows on the database of the row's seed and other rows on that of the next
seed, so a constant cannot score; SQL that ignores a part of the question returns something else; its order, where it
has one, is free of ties. Validation and test ask about other domains, in other wordings, than training.
"""

import random
from collections.abc import Iterator
from typing import Any

from lightning_peft.tasks.text_to_sql.grammar.database import DatabasePair, QueryError, is_ordered, same_result
from lightning_peft.tasks.text_to_sql.grammar.database_schema import DOMAINS, draw_schema
from lightning_peft.tasks.text_to_sql.grammar.draw import Draw, Query, Unavailable
from lightning_peft.tasks.text_to_sql.grammar.kinds import KINDS, ask, draw_kind

ATTEMPTS_PER_SCHEMA = 16
TRAINING_ROWS = 4000
"""Training rows where no number is asked for."""
VALIDATION_ROWS = 200
"""Validation and test rows where no number is asked for."""


def _is_valid(query: Query, databases: DatabasePair) -> bool:
    ordered = is_ordered(query.sql)
    first, second = databases.run(query.sql)
    if not first or not second or (None,) in first + second or same_result(first, second, ordered):
        return False
    for sql in query.simpler:
        if all(same_result(a, b, ordered) for a, b in zip((first, second), databases.run(sql), strict=True)):
            return False
    for keys in databases.run(query.sort_keys) if query.sort_keys else []:
        relevant = keys[: query.limit + 1] if query.limit else keys
        if len(set(relevant)) < len(relevant):
            return False
    return True


def _wrong_answer(rng: random.Random, draw: Draw, query: Query, databases: DatabasePair) -> str | None:
    """Return SQL that runs and returns something else: it ignores a part of the question, else answers another one."""
    results, ordered = databases.run(query.sql), is_ordered(query.sql)
    candidates = rng.sample(query.simpler, len(query.simpler))
    for name in rng.choices(list(KINDS), k=ATTEMPTS_PER_SCHEMA):
        try:
            candidates.append(KINDS[name].draw(draw).sql)
        except Unavailable:
            continue
    for sql in candidates:
        try:
            found = databases.run(sql)
        except QueryError:
            continue
        if not all(same_result(a, b, ordered) for a, b in zip(results, found, strict=True)):
            return sql
    return None


def _draw_row(rng: random.Random, split: str, kind_name: str, with_wrong: bool) -> dict[str, Any] | None:
    """Return a row of this kind on a fresh schema, or None when the schema or its rows do not allow one."""
    kind = KINDS[kind_name]
    schema = draw_schema(rng, split)
    seed = rng.getrandbits(31)
    with DatabasePair(schema, seed) as databases:
        draw = Draw(rng, schema, databases.first_rows, held_out=split != "train")
        for _ in range(ATTEMPTS_PER_SCHEMA):
            try:
                query = kind.draw(draw)
            except Unavailable:
                continue
            if _is_valid(query, databases):
                row: dict[str, Any] = {"prompt": f"{schema.line()}\n{ask(draw, query, kind)}", "completion": query.sql}
                row |= {"level": kind.level, "kind": kind_name, "schema": schema.line(), "seed": seed}
                if with_wrong:
                    row["wrong"] = _wrong_answer(rng, draw, query, databases)
                return row
    return None


def generate_row(seed: int, split: str, index: int, with_wrong: bool = False) -> dict[str, Any]:
    """Return a row: `prompt` (schema line, question), `completion` (SQL), `level`, `kind`, `schema`, `seed` (of rows).

    With `with_wrong` it has `wrong` too: SQL that runs and returns other rows.
    """
    rng = random.Random(f"{seed}/{split}/{index}")
    kind = draw_kind(rng)
    while True:
        row = _draw_row(rng, split, kind, with_wrong)
        if row is not None and (not with_wrong or row["wrong"] is not None):
            return row


def generate_preference(seed: int, split: str, labelled: bool, index: int) -> dict[str, Any]:
    """Return `prompt`, `chosen`, `rejected`; if labelled `prompt`, `completion`, `label`, every second right."""
    row = generate_row(seed, split, index, with_wrong=True)
    right, wrong = row.pop("completion"), row.pop("wrong")
    if labelled:
        return {**row, "completion": wrong if index % 2 else right, "label": index % 2 == 0}
    return {**row, "chosen": right, "rejected": wrong}


def generate_rows(count: int, seed: int, split: str) -> list[dict[str, Any]]:
    """Return the first `count` rows of train, validation or test; row i depends on (seed, split, i) alone."""
    if split not in DOMAINS:
        raise ValueError(f"split={split!r}: must be one of {', '.join(DOMAINS)}")
    return [generate_row(seed, split, index) for index in range(count)]


def rows_of_kind(split: str, seed: int, count: int | None, kind: str) -> Iterator[dict[str, Any]]:
    """Return rows with answers, or with a right and a wrong one: pairs, or labelled."""
    numbers = range(count or (TRAINING_ROWS if split == "train" else VALIDATION_ROWS))
    if kind == "answers":
        return (generate_row(seed, split, number) for number in numbers)
    return (generate_preference(seed, split, kind == "labelled", number) for number in numbers)
