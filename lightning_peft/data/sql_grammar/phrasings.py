"""How the questions are worded: for each place a list for training and a list held out for validation and test."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """Interchangeable phrases; no phrase of `held_out` stands in `train`."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


# Whole questions for each kind of query. `things` and `thing` are a table's plural and singular, `where` a condition.
QUESTIONS = {
    "list": Wording(
        (
            "List the {columns} of all {things}.",
            "Show the {columns} of every {thing}.",
            "What {is} the {columns} of all {things}?",
            "Give me the {columns} of the {things}.",
        ),
        ("Find the {columns} of all the {things}.", "I need the {columns} of every {thing}."),
    ),
    "filter": Wording(
        (
            "List the {columns} of all {things} {where}.",
            "Show the {columns} of the {things} {where}.",
            "What {is} the {columns} of {things} {where}?",
            "Give me the {columns} of every {thing} {where}.",
        ),
        ("Find the {columns} of {things} {where}.", "I need the {columns} of each {thing} {where}."),
    ),
    "count": Wording(
        ("How many {things} are there?", "Count the {things}.", "What is the number of {things}?"),
        ("Find the total number of {things}.", "How many {things} do we have?"),
    ),
    "count_filter": Wording(
        (
            "How many {things} are there {where}?",
            "Count the {things} {where}.",
            "What is the number of {things} {where}?",
        ),
        ("Find the number of all {things} {where}.", "I need the count of {things} {where}."),
    ),
    "aggregate": Wording(
        (
            "What is the {aggregate} {column} of all {things}?",
            "Show the {aggregate} {column} of the {things}.",
            "Give the {aggregate} {column} over all {things}.",
        ),
        ("Find the {aggregate} {column} across all {things}.", "I need the {aggregate} {column} among {things}."),
    ),
    "aggregate_filter": Wording(
        (
            "What is the {aggregate} {column} of all {things} {where}?",
            "Show the {aggregate} {column} of the {things} {where}.",
            "Give the {aggregate} {column} over all {things} {where}.",
        ),
        (
            "Find the {aggregate} {column} across {things} {where}.",
            "I need the {aggregate} {column} among {things} {where}.",
        ),
    ),
    "sort": Wording(
        (
            "List the {columns} of all {things} {order}.",
            "Show the {columns} of the {things} {order}.",
            "What {is} the {columns} of all {things} {order}?",
        ),
        ("Find the {columns} of every {thing}, {order}.", "I need the {columns} of all the {things} {order}."),
    ),
    "distinct": Wording(
        (
            "What are the different {column} values of the {things}?",
            "List each distinct {column} of the {things}.",
            "Show all different {column} values of {things}.",
        ),
        ("Find every distinct {column} among the {things}.", "Which different {column} values do {things} have?"),
    ),
    "count_distinct": Wording(
        (
            "How many different {column} values do the {things} have?",
            "Count the distinct {column} values of the {things}.",
            "What is the number of different {column} values of {things}?",
        ),
        (
            "Find the number of distinct {column} values among {things}.",
            "How many distinct {column} values occur among {things}?",
        ),
    ),
    "top": Wording(
        (
            "What {is} the {columns} of the {thing} with the {superlative} {column}?",
            "Show the {columns} of the {thing} that has the {superlative} {column}.",
            "Which {thing} has the {superlative} {column}? Give its {columns}.",
        ),
        (
            "Find the {columns} of the {thing} having the {superlative} {column}.",
            "For the {thing} with the {superlative} {column}, give the {columns}.",
        ),
    ),
    "top_several": Wording(
        (
            "List the {columns} of the {number} {things} with the {superlative} {column}.",
            "Show the {columns} of the {number} {things} that have the {superlative} {column}.",
            "What {is} the {columns} of the {number} {things} with the {superlative} {column}?",
        ),
        (
            "Find the {columns} of those {number} {things} with the {superlative} {column}.",
            "For the {number} {things} with the {superlative} {column}, give the {columns}.",
        ),
    ),
    "group_count": Wording(
        (
            "How many {things} are there for each {group}?",
            "For each {group}, show the number of {things}.",
            "List each {group} and the number of {things} with it.",
        ),
        ("Find the number of {things} per {group}.", "For every {group}, count the {things}."),
    ),
    "group_aggregate": Wording(
        (
            "What is the {aggregate} {column} of {things} for each {group}?",
            "For each {group}, show the {aggregate} {column} of the {things}.",
            "List each {group} and the {aggregate} {column} of its {things}.",
        ),
        (
            "Find the {aggregate} {column} of {things} per {group}.",
            "For every {group}, give the {aggregate} {column} of {things}.",
        ),
    ),
    "join_list": Wording(
        (
            "List the {columns} of each {thing} and the {parent_column} of its {parent}.",
            "Show the {columns} of all {things} together with the {parent_column} of their {parent}.",
            "What {is} the {columns} of all {things} and the {parent_column} of their {parent}?",
        ),
        (
            "Find the {columns} of every {thing} along with its {parent}'s {parent_column}.",
            "For all {things}, give the {columns} and the {parent_column} of the {parent}.",
        ),
    ),
    "join_filter": Wording(
        (
            "List the {columns} of all {things} of {parents} {where}.",
            "Show the {columns} of the {things} that belong to {parents} {where}.",
            "What {is} the {columns} of {things} of {a_parent} {where}?",
        ),
        (
            "Find the {columns} of every {thing} belonging to {a_parent} {where}.",
            "I need the {columns} of {things} from {parents} {where}.",
        ),
    ),
    "join_count": Wording(
        (
            "How many {things} belong to {parents} {where}?",
            "Count the {things} of {parents} {where}.",
            "What is the number of {things} of {parents} {where}?",
        ),
        (
            "Find the number of {things} belonging to {a_parent} {where}.",
            "How many {things} come from {parents} {where}?",
        ),
    ),
    "having": Wording(
        (
            "Which {group} values have {compare} {number} {things}?",
            "List each {group} with {compare} {number} {things}.",
            "Show every {group} that has {compare} {number} {things}.",
        ),
        (
            "Find all {group} values having {compare} {number} {things}.",
            "What {group} values are shared by {compare} {number} {things}?",
        ),
    ),
    "having_aggregate": Wording(
        (
            "Which {group} values have {things} with {an_aggregate} {column} {compare} {number}?",
            "List each {group} whose {things} have {an_aggregate} {column} {compare} {number}.",
        ),
        ("Find all {group} values where the {aggregate} {column} of {things} is {compare} {number}.",),
    ),
    "most_common": Wording(
        (
            "Which {group} has the {extreme} {things}?",
            "Show the {group} with the {extreme} {things}.",
            "What is the {group} that has the {extreme} {things}?",
        ),
        ("Find the {group} having the {extreme} {things}.", "Tell me which {group} the {extreme} {things} have."),
    ),
    # "that has" leaves out parents without children, as the inner join does
    "children_count": Wording(
        (
            "For each {parent} that has {things}, show its {parent_column} and their number.",
            "List the {parent_column} of each {parent} with {things} and how many {things} it has.",
            "How many {things} does each {parent} with any have? Give the {parent_column} and the number.",
        ),
        (
            "Find the {parent_column} and the number of {things} of every {parent} that has any.",
            "For every {parent} having {things}, give its {parent_column} and how many there are.",
        ),
    ),
    "children_having": Wording(
        (
            "List the {parent_column} of the {parents} that have {compare} {number} {things}.",
            "Show the {parent_column} of every {parent} with {compare} {number} {things}.",
            "Which {parents} have {compare} {number} {things}? Give the {parent_column}.",
        ),
        ("Find the {parent_column} of all {parents} having {compare} {number} {things}.",),
    ),
    "most_children": Wording(
        (
            "What is the {parent_column} of the {parent} with the {extreme} {things}?",
            "Which {parent} has the {extreme} {things}? Give its {parent_column}.",
            "Show the {parent_column} of the {parent} that has the {extreme} {things}.",
        ),
        ("Find the {parent_column} of the {parent} having the {extreme} {things}.",),
    ),
    "no_children": Wording(
        (
            "List the {columns} of {parents} that have no {thing}.",
            "Show the {columns} of the {parents} without any {things}.",
            "Which {parents} have no {things}? Give their {columns}.",
        ),
        (
            "Find the {columns} of all {parents} that do not have any {thing}.",
            "I need the {columns} of {parents} lacking {a_thing}.",
        ),
    ),
    "children_in": Wording(
        (
            "List the {columns} of {parents} that have {a_thing} {where}.",
            "Show the {columns} of the {parents} with at least one {thing} {where}.",
            "Which {parents} have {a_thing} {where}? Give their {columns}.",
        ),
        (
            "Find the {columns} of all {parents} having some {thing} {where}.",
            "I need the {columns} of {parents} that own {a_thing} {where}.",
        ),
    ),
    "versus_average": Wording(
        (
            "List the {columns} of {things} with {a_column} {side} the average.",
            "Show the {columns} of the {things} whose {column} is {side} the average {column}.",
            "Which {things} have {a_column} {side} the average? Give their {columns}.",
        ),
        (
            "Find the {columns} of all {things} that are {side} average in {column}.",
            "I need the {columns} of {things} where {column} is {side} the overall average.",
        ),
    ),
    "versus_group": Wording(
        (
            "List the {columns} of {things} with {a_column} {side} the {aggregate} {column} of {things} {where}.",
            "Show the {columns} of the {things} whose {column} is {side} the {aggregate} {column} of {things} {where}.",
        ),
        ("Find the {columns} of all {things} where {column} is {side} the {aggregate} {column} of {things} {where}.",),
    ),
    "intersect": Wording(
        (
            "Which {group} values have both {things} {where} and {things} {other}?",
            "List each {group} that has {things} {where} and also {things} {other}.",
        ),
        ("Find the {group} values shared by {things} {where} and {things} {other}.",),
    ),
    "except": Wording(
        (
            "Which {group} values have {things} {where} but no {things} {other}?",
            "List each {group} that has {things} {where} but not {things} {other}.",
        ),
        ("Find the {group} values of {things} {where}, leaving out those of {things} {other}.",),
    ),
    "grandparent_filter": Wording(
        (
            "List the {columns} of {things} whose {parent} belongs to {grandparents} {where}.",
            "Show the {columns} of the {things} of {parents} of {grandparents} {where}.",
        ),
        ("Find the {columns} of every {thing} of {a_parent} belonging to {a_grandparent} {where}.",),
    ),
}

# Conditions, after a plural or singular noun. The key is the SQL operator, or the column kind and the operator.
CONDITIONS = {
    "=": Wording(
        ("whose {column} is {value}", "with {column} {value}"),
        ("with {column} equal to {value}", "where the {column} is {value}"),
    ),
    "!=": Wording(
        ("whose {column} is not {value}", "with {a_column} other than {value}"), ("where the {column} is not {value}",)
    ),
    ">": Wording(
        ("with {column} above {value}", "whose {column} is greater than {value}", "with {column} more than {value}"),
        ("where the {column} is above {value}", "with {column} over {value}"),
    ),
    "<": Wording(
        ("with {column} below {value}", "whose {column} is less than {value}", "with {column} smaller than {value}"),
        ("where the {column} is below {value}", "with {column} under {value}"),
    ),
    ">=": Wording(
        ("with {column} of at least {value}", "whose {column} is at least {value}"),
        ("where the {column} is at least {value}", "with {column} {value} or more"),
    ),
    "<=": Wording(
        ("with {column} of at most {value}", "whose {column} is at most {value}"),
        ("where the {column} is at most {value}", "with {column} {value} or less"),
    ),
    "date >": Wording(
        ("with {column} after {value}", "whose {column} is after {value}"),
        ("where the {column} is after {value}", "with {column} later than {value}"),
    ),
    "date <": Wording(
        ("with {column} before {value}", "whose {column} is before {value}"),
        ("where the {column} is before {value}", "with {column} earlier than {value}"),
    ),
    "between": Wording(
        ("with {column} between {value} and {high}", "whose {column} is between {value} and {high}"),
        ("where the {column} is between {value} and {high}", "with {column} from {value} to {high}"),
    ),
    "starts": Wording(
        ("whose {column} starts with '{value}'", "with {a_column} starting with '{value}'"),
        ("whose {column} begins with '{value}'",),
    ),
    "contains": Wording(
        ("whose {column} contains '{value}'", "with '{value}' in the {column}"), ("whose {column} includes '{value}'",)
    ),
    "ends": Wording(
        ("whose {column} ends with '{value}'", "with {a_column} ending in '{value}'"),
        ("whose {column} finishes with '{value}'",),
    ),
}

ORDERS = {
    "ASC": Wording(
        ("sorted by {column} in ascending order", "ordered by {column} from lowest to highest"),
        ("in ascending order of {column}", "sorted from the lowest to the highest {column}"),
    ),
    "DESC": Wording(
        ("sorted by {column} in descending order", "ordered by {column} from highest to lowest"),
        ("in descending order of {column}", "sorted from the highest to the lowest {column}"),
    ),
}

# Single words: the same for all splits.
AGGREGATES = {
    "avg": ("average", "mean"),
    "sum": ("total",),
    "min": ("minimum", "lowest", "smallest"),
    "max": ("maximum", "highest", "largest"),
}
SUPERLATIVES = {"DESC": ("highest", "largest"), "ASC": ("lowest", "smallest")}
DATE_SUPERLATIVES = {"DESC": ("latest", "most recent"), "ASC": ("earliest",)}
EXTREMES = {"DESC": "most", "ASC": "fewest"}
COMPARISONS = {">": "more than", ">=": "at least", "<": "fewer than"}
SIDES = {">": "above", "<": "below"}
