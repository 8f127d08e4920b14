"""The kinds of query, how hard each is, and how often each is drawn."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from lightning_peft.tasks.text_to_sql.grammar import one_table, several_tables
from lightning_peft.tasks.text_to_sql.grammar.draw import Draw, Query
from lightning_peft.tasks.text_to_sql.grammar.questions import QUESTIONS


@dataclass(frozen=True)
class QueryKind:
    """One kind of query: how hard it is, how it is drawn, the key of its wordings in `QUESTIONS`."""

    level: str
    draw: Callable[[Draw], Query]
    phrasing: str


KINDS = {
    "list": QueryKind("easy", one_table.list_columns, "list"),
    "filter": QueryKind("easy", one_table.filter_rows, "filter"),
    "count": QueryKind("easy", one_table.count_rows, "count"),
    "count_filter": QueryKind("easy", one_table.count_filter, "count_filter"),
    "aggregate": QueryKind("easy", one_table.aggregate, "aggregate"),
    "aggregate_filter": QueryKind("easy", one_table.aggregate_filter, "aggregate_filter"),
    "sort": QueryKind("easy", one_table.sort, "sort"),
    "distinct": QueryKind("easy", one_table.distinct, "distinct"),
    "count_distinct": QueryKind("easy", one_table.count_distinct, "count_distinct"),
    "top": QueryKind("medium", one_table.top, "top"),
    "top_several": QueryKind("medium", one_table.top_several, "top_several"),
    "compound": QueryKind("medium", one_table.filter_compound, "filter"),
    "count_compound": QueryKind("medium", one_table.count_compound, "count_filter"),
    "between": QueryKind("medium", one_table.filter_between, "filter"),
    "like": QueryKind("medium", one_table.filter_like, "filter"),
    "group_count": QueryKind("medium", one_table.group_count, "group_count"),
    "group_aggregate": QueryKind("medium", one_table.group_aggregate, "group_aggregate"),
    "join_list": QueryKind("medium", several_tables.join_list, "join_list"),
    "join_filter": QueryKind("medium", several_tables.join_filter, "join_filter"),
    "join_count": QueryKind("medium", several_tables.join_count, "join_count"),
    "nested": QueryKind("hard", one_table.filter_nested, "filter"),
    "having": QueryKind("hard", one_table.having, "having"),
    "having_aggregate": QueryKind("hard", one_table.having_aggregate, "having_aggregate"),
    "most_common": QueryKind("hard", one_table.most_common, "most_common"),
    "children_count": QueryKind("hard", several_tables.children_count, "children_count"),
    "children_having": QueryKind("hard", several_tables.children_having, "children_having"),
    "most_children": QueryKind("hard", several_tables.most_children, "most_children"),
    "no_children": QueryKind("hard", several_tables.no_children, "no_children"),
    "children_in": QueryKind("hard", several_tables.children_in, "children_in"),
    "versus_average": QueryKind("hard", one_table.versus_average, "versus_average"),
    "versus_group": QueryKind("hard", one_table.versus_group, "versus_group"),
    "intersect": QueryKind("hard", one_table.intersect, "intersect"),
    "except": QueryKind("hard", one_table.set_difference, "except"),
    "grandparent_filter": QueryKind("hard", several_tables.grandparent_filter, "grandparent_filter"),
}
LEVEL_SHARES = {"easy": 0.45, "medium": 0.35, "hard": 0.20}


def draw_kind(rng: random.Random) -> str:
    """Return a kind of query: the level by its share, then every kind of that level alike."""
    level = rng.choices(list(LEVEL_SHARES), weights=list(LEVEL_SHARES.values()))[0]
    return rng.choice([name for name, kind in KINDS.items() if kind.level == level])


def ask(draw: Draw, query: Query, kind: QueryKind) -> str:
    """Return the question in words."""
    return draw.phrase(QUESTIONS[kind.phrasing]).format(**query.words)
