"""Questions about one table: each function draws the SQL of one kind and the words of its question."""

from collections import Counter

from lightning_peft.tasks.text_to_sql.grammar import phrasings
from lightning_peft.tasks.text_to_sql.grammar.database_schema import Table
from lightning_peft.tasks.text_to_sql.grammar.draw import (
    NUMBERS,
    RANGES,
    Condition,
    Draw,
    Query,
    column_words,
    names,
    order_by,
    thing_words,
    with_article,
)


def list_columns(draw: Draw) -> Query:
    table = draw.table()
    columns = draw.columns(table)
    return Query(f"SELECT {names(columns)} FROM {table.name}", {**column_words(columns), **thing_words(table)})


def _select_where(draw: Draw, table: Table, where: Condition) -> Query:
    columns = draw.columns(table)
    select = f"SELECT {names(columns)} FROM {table.name}"
    words = {**column_words(columns), "where": where.words, **thing_words(table)}
    return Query(f"{select} WHERE {where.sql}", words, (select, *(f"{select} WHERE {part}" for part in where.parts)))


def filter_rows(draw: Draw) -> Query:
    table = draw.table()
    return _select_where(draw, table, draw.condition(table))


def filter_between(draw: Draw) -> Query:
    table = draw.table()
    return _select_where(draw, table, draw.between(table))


def filter_like(draw: Draw) -> Query:
    table = draw.table()
    return _select_where(draw, table, draw.like(table))


def filter_compound(draw: Draw) -> Query:
    table = draw.table()
    return _select_where(draw, table, draw.compound(table, "AND", "OR"))


def filter_nested(draw: Draw) -> Query:
    table = draw.table()
    return _select_where(draw, table, draw.nested(table))


def count_rows(draw: Draw) -> Query:
    table = draw.table()
    return Query(f"SELECT count(*) FROM {table.name}", thing_words(table))


def _count_where(table: Table, where: Condition) -> Query:
    count = f"SELECT count(*) FROM {table.name}"
    simpler = (count, *(f"{count} WHERE {part}" for part in where.parts))
    return Query(f"{count} WHERE {where.sql}", {"where": where.words, **thing_words(table)}, simpler)


def count_filter(draw: Draw) -> Query:
    table = draw.table()
    return _count_where(table, draw.condition(table))


def count_compound(draw: Draw) -> Query:
    table = draw.table()
    return _count_where(table, draw.compound(table, "AND", "OR"))


def aggregate(draw: Draw) -> Query:
    table = draw.table()
    function, word, column = draw.aggregate(table)
    words = {"aggregate": word, "column": column.words, **thing_words(table)}
    return Query(f"SELECT {function}({column.name}) FROM {table.name}", words)


def aggregate_filter(draw: Draw) -> Query:
    table = draw.table()
    function, word, column = draw.aggregate(table)
    where = draw.condition(table, exclude=[column])
    select = f"SELECT {function}({column.name}) FROM {table.name}"
    words = {"aggregate": word, "column": column.words, "where": where.words, **thing_words(table)}
    return Query(f"{select} WHERE {where.sql}", words, (select,))


def sort(draw: Draw) -> Query:
    table = draw.table()
    key = draw.column(table, *RANGES)
    columns = draw.columns(table)
    direction = draw.direction()
    select = f"SELECT {names(columns)} FROM {table.name}"
    order = order_by(key.name, direction)
    words = {**column_words(columns), "order": draw.phrase(phrasings.ORDERS[direction]).format(column=key.words)}
    sort_keys = f"SELECT {key.name} FROM {table.name} {order}"
    return Query(f"{select} {order}", {**words, **thing_words(table)}, (select,), sort_keys)


def distinct(draw: Draw) -> Query:
    table = draw.table()
    column = draw.column(table, "category")
    words = {"column": column.words, **thing_words(table)}
    simpler = (f"SELECT {column.name} FROM {table.name}",)
    return Query(f"SELECT DISTINCT {column.name} FROM {table.name}", words, simpler)


def count_distinct(draw: Draw) -> Query:
    table = draw.table()
    column = draw.column(table, "category")
    words = {"column": column.words, **thing_words(table)}
    simpler = (f"SELECT count({column.name}) FROM {table.name}",)
    return Query(f"SELECT count(DISTINCT {column.name}) FROM {table.name}", words, simpler)


def _top(draw: Draw, limit: int) -> Query:
    table = draw.table()
    key = draw.column(table, *RANGES)
    columns = draw.columns(table, exclude=[key])
    direction = draw.direction()
    select = f"SELECT {names(columns)} FROM {table.name}"
    order = order_by(key.name, direction)
    superlatives = phrasings.DATE_SUPERLATIVES if key.kind in ("date", "year") else phrasings.SUPERLATIVES
    words = {"column": key.words, "superlative": draw.rng.choice(superlatives[direction]), "number": str(limit)}
    simpler = (f"{select} LIMIT {limit}", f"{select} {order}")
    sort_keys = f"SELECT {key.name} FROM {table.name} {order}"
    words |= {**column_words(columns), **thing_words(table)}
    return Query(f"{select} {order} LIMIT {limit}", words, simpler, sort_keys, limit)


def top(draw: Draw) -> Query:
    return _top(draw, 1)


def top_several(draw: Draw) -> Query:
    return _top(draw, draw.rng.randint(2, 5))


def group_count(draw: Draw) -> Query:
    table = draw.table()
    group = draw.column(table, "category")
    sql = f"SELECT {group.name}, count(*) FROM {table.name} GROUP BY {group.name}"
    return Query(sql, {"group": group.words, **thing_words(table)})


def group_aggregate(draw: Draw) -> Query:
    table = draw.table()
    group = draw.column(table, "category")
    function, word, column = draw.aggregate(table)
    sql = f"SELECT {group.name}, {function}({column.name}) FROM {table.name} GROUP BY {group.name}"
    return Query(sql, {"group": group.words, "aggregate": word, "column": column.words, **thing_words(table)})


def having(draw: Draw) -> Query:
    table = draw.table()
    group = draw.column(table, "category")
    sizes = Counter(draw.values(table, group))
    operator = draw.one(list(phrasings.COMPARISONS))
    number = draw.one(sorted(sizes.values()))
    grouped = f"SELECT {group.name} FROM {table.name} GROUP BY {group.name}"
    words = {"compare": phrasings.COMPARISONS[operator], "number": str(number), "group": group.words}
    return Query(f"{grouped} HAVING count(*) {operator} {number}", {**words, **thing_words(table)}, (grouped,))


def having_aggregate(draw: Draw) -> Query:
    table = draw.table()
    group = draw.column(table, "category")
    column = draw.column(table, *NUMBERS)
    operator = draw.one(list(phrasings.SIDES))
    values = sorted(float(value) for value in draw.values(table, column))
    number = round(values[len(values) // 2 + draw.rng.randint(-2, 2)])
    grouped = f"SELECT {group.name} FROM {table.name} GROUP BY {group.name}"
    words = {"column": column.words, "group": group.words, "number": str(number)}
    average = draw.one(phrasings.AGGREGATES["avg"])
    words |= {"aggregate": average, "an_aggregate": with_article(average), "compare": phrasings.SIDES[operator]}
    sql = f"{grouped} HAVING avg({column.name}) {operator} {number}"
    return Query(sql, {**words, **thing_words(table)}, (grouped,))


def most_common(draw: Draw) -> Query:
    table = draw.table()
    group = draw.column(table, "category")
    direction = draw.direction()
    grouped = f"FROM {table.name} GROUP BY {group.name}"
    order = order_by("count(*)", direction)
    words = {"group": group.words, "extreme": phrasings.EXTREMES[direction], **thing_words(table)}
    simpler = (f"SELECT {group.name} {grouped} LIMIT 1",)
    sort_keys = f"SELECT count(*) {grouped} {order}"
    return Query(f"SELECT {group.name} {grouped} {order} LIMIT 1", words, simpler, sort_keys, 1)


def versus_average(draw: Draw) -> Query:
    table = draw.table()
    column = draw.column(table, *NUMBERS)
    columns = draw.columns(table)
    operator = draw.one(list(phrasings.SIDES))
    select = f"SELECT {names(columns)} FROM {table.name}"
    words = {**column_words(columns), "column": column.words, "a_column": with_article(column.words)}
    words["side"] = phrasings.SIDES[operator]
    sql = f"{select} WHERE {column.name} {operator} (SELECT avg({column.name}) FROM {table.name})"
    return Query(sql, {**words, **thing_words(table)}, (select,))


def versus_group(draw: Draw) -> Query:
    table = draw.table()
    column = draw.column(table, *NUMBERS)
    columns = draw.columns(table)
    operator = draw.one(list(phrasings.SIDES))
    function = draw.one(["avg", "max", "min"])
    where = draw.condition(table, exclude=[column])
    select = f"SELECT {names(columns)} FROM {table.name}"
    compare = f"{select} WHERE {column.name} {operator} (SELECT {function}({column.name}) FROM {table.name}"
    words = {
        **column_words(columns),
        "column": column.words,
        "a_column": with_article(column.words),
        "where": where.words,
    }
    words["side"] = phrasings.SIDES[operator]
    words |= {"aggregate": draw.one(phrasings.AGGREGATES[function]), **thing_words(table)}
    return Query(f"{compare} WHERE {where.sql})", words, (select, f"{compare})"))


def _set_operation(draw: Draw, operator: str) -> Query:
    table = draw.table()
    group = draw.column(table, "category")
    first = draw.condition(table, exclude=[group])
    second = draw.condition(table, exclude=[group])
    select = f"SELECT {group.name} FROM {table.name} WHERE"
    alone = tuple(f"SELECT DISTINCT {group.name} FROM {table.name} WHERE {part.sql}" for part in (first, second))
    words = {"group": group.words, "where": first.words, "other": second.words, **thing_words(table)}
    return Query(f"{select} {first.sql} {operator} {select} {second.sql}", words, alone)


def intersect(draw: Draw) -> Query:
    return _set_operation(draw, "INTERSECT")


def set_difference(draw: Draw) -> Query:
    return _set_operation(draw, "EXCEPT")
