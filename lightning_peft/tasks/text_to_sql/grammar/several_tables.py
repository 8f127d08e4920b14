"""Questions about linked tables: each function draws the SQL of one kind and the words of its question."""

from lightning_peft.tasks.text_to_sql.grammar import phrasings
from lightning_peft.tasks.text_to_sql.grammar.draw import (
    Draw,
    Query,
    column_words,
    family_words,
    join,
    names,
    order_by,
)


def join_list(draw: Draw) -> Query:
    parent, child = draw.link()
    columns = draw.columns(child, most=1)
    shown = draw.columns(parent, most=1)
    sql = f"SELECT {names(columns, child.name + '.')}, {names(shown, parent.name + '.')} {join(parent, child)}"
    return Query(sql, {**column_words(columns), "parent_column": shown[0].words, **family_words(parent, child)})


def join_filter(draw: Draw) -> Query:
    parent, child = draw.link()
    columns = draw.columns(child)
    where = draw.condition(parent, f"{parent.name}.")
    select = f"SELECT {names(columns, child.name + '.')} {join(parent, child)}"
    words = {**column_words(columns), "where": where.words, **family_words(parent, child)}
    return Query(f"{select} WHERE {where.sql}", words, (select,))


def join_count(draw: Draw) -> Query:
    parent, child = draw.link()
    where = draw.condition(parent, f"{parent.name}.")
    count = f"SELECT count(*) {join(parent, child)}"
    return Query(f"{count} WHERE {where.sql}", {"where": where.words, **family_words(parent, child)}, (count,))


def children_count(draw: Draw) -> Query:
    parent, child = draw.link()
    label = draw.column(parent, "label")
    sql = f"SELECT {parent.name}.{label.name}, count(*) {join(parent, child)} GROUP BY {parent.name}.id"
    return Query(sql, {"parent_column": label.words, **family_words(parent, child)})


def children_having(draw: Draw) -> Query:
    parent, child = draw.link()
    label = draw.column(parent, "label")
    number = draw.rng.randint(2, 3)
    operator = draw.one([">", ">="])
    grouped = f"SELECT {parent.name}.{label.name} {join(parent, child)} GROUP BY {parent.name}.id"
    words = {"parent_column": label.words, "number": str(number), "compare": phrasings.COMPARISONS[operator]}
    sql = f"{grouped} HAVING count(*) {operator} {number}"
    return Query(sql, {**words, **family_words(parent, child)}, (grouped,))


def most_children(draw: Draw) -> Query:
    parent, child = draw.link()
    label = draw.column(parent, "label")
    # Only "most" is asked: parents without children have the fewest, and an inner join leaves them out.
    grouped = f"{join(parent, child)} GROUP BY {parent.name}.id"
    order = order_by("count(*)", "DESC")
    words = {"parent_column": label.words, "extreme": phrasings.EXTREMES["DESC"], **family_words(parent, child)}
    select = f"SELECT {parent.name}.{label.name} {grouped}"
    return Query(f"{select} {order} LIMIT 1", words, (f"{select} LIMIT 1",), f"SELECT count(*) {grouped} {order}", 1)


def no_children(draw: Draw) -> Query:
    parent, child = draw.link()
    columns = draw.columns(parent)
    select = f"SELECT {names(columns)} FROM {parent.name}"
    words = {**column_words(columns), **family_words(parent, child)}
    return Query(f"{select} WHERE id NOT IN (SELECT {parent.name}_id FROM {child.name})", words, (select,))


def children_in(draw: Draw) -> Query:
    parent, child = draw.link()
    columns = draw.columns(parent)
    where = draw.condition(child)
    select = f"SELECT {names(columns)} FROM {parent.name}"
    children = f"SELECT {parent.name}_id FROM {child.name}"
    words = {**column_words(columns), "where": where.words, **family_words(parent, child)}
    simpler = (select, f"{select} WHERE id IN ({children})")
    return Query(f"{select} WHERE id IN ({children} WHERE {where.sql})", words, simpler)


def grandparent_filter(draw: Draw) -> Query:
    links = draw.schema.children()
    grandparent, parent, child = draw.one([(a, b, c) for a, b in links for parent, c in links if parent == b])
    columns = draw.columns(child)
    where = draw.condition(grandparent, f"{grandparent.name}.")
    second = f"JOIN {grandparent.name} ON {parent.name}.{grandparent.name}_id = {grandparent.name}.id"
    select = f"SELECT {names(columns, child.name + '.')} {join(parent, child)} {second}"
    elders = family_words(grandparent, parent)
    words = {"grandparents": elders["parents"], "a_grandparent": elders["a_parent"], **family_words(parent, child)}
    return Query(f"{select} WHERE {where.sql}", {**column_words(columns), "where": where.words, **words}, (select,))
