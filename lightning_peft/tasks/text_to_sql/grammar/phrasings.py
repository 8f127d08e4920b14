"""The wordings of a question's parts: for each a list for training and a list held out for validation and test."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """Interchangeable phrases; no phrase of `held_out` stands in `train`."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


# Conditions, after a plural or singular noun. The key is the SQL operator, or the column kind and the operator.
CONDITIONS = {
    "=": Wording(
        (
            "whose {column} is {value}",
            "with {column} {value}",
            "having {column} {value}",
            "where {column} equals {value}",
            "for which the {column} is {value}",
        ),
        ("with {column} equal to {value}", "where the {column} is {value}"),
    ),
    "!=": Wording(
        (
            "whose {column} is not {value}",
            "with {a_column} other than {value}",
            "whose {column} differs from {value}",
            "where {column} does not equal {value}",
            "for which the {column} is not {value}",
        ),
        ("where the {column} is not {value}",),
    ),
    ">": Wording(
        (
            "with {column} above {value}",
            "whose {column} is greater than {value}",
            "with {column} more than {value}",
            "having {column} greater than {value}",
            "where {column} exceeds {value}",
            "whose {column} is over {value}",
        ),
        ("where the {column} is above {value}", "with {column} over {value}"),
    ),
    "<": Wording(
        (
            "with {column} below {value}",
            "whose {column} is less than {value}",
            "with {column} smaller than {value}",
            "having {column} less than {value}",
            "where {column} is smaller than {value}",
            "whose {column} is under {value}",
        ),
        ("where the {column} is below {value}", "with {column} under {value}"),
    ),
    ">=": Wording(
        (
            "with {column} of at least {value}",
            "whose {column} is at least {value}",
            "having at least {value} as {column}",
            "where {column} is no less than {value}",
            "whose {column} is {value} or higher",
        ),
        ("where the {column} is at least {value}", "with {column} {value} or more"),
    ),
    "<=": Wording(
        (
            "with {column} of at most {value}",
            "whose {column} is at most {value}",
            "having at most {value} as {column}",
            "where {column} is no more than {value}",
            "whose {column} is {value} or lower",
        ),
        ("where the {column} is at most {value}", "with {column} {value} or less"),
    ),
    "date >": Wording(
        (
            "with {column} after {value}",
            "whose {column} is after {value}",
            "having {a_column} after {value}",
            "where {column} comes after {value}",
            "whose {column} is later than {value}",
        ),
        ("where the {column} is after {value}", "with {column} later than {value}"),
    ),
    "date <": Wording(
        (
            "with {column} before {value}",
            "whose {column} is before {value}",
            "having {a_column} before {value}",
            "where {column} comes before {value}",
            "whose {column} is earlier than {value}",
        ),
        ("where the {column} is before {value}", "with {column} earlier than {value}"),
    ),
    "between": Wording(
        (
            "with {column} between {value} and {high}",
            "whose {column} is between {value} and {high}",
            "having {column} between {value} and {high}",
            "where {column} lies between {value} and {high}",
            "whose {column} ranges from {value} to {high}",
        ),
        ("where the {column} is between {value} and {high}", "with {column} from {value} to {high}"),
    ),
    "starts": Wording(
        (
            "whose {column} starts with '{value}'",
            "with {a_column} starting with '{value}'",
            "where {column} starts with '{value}'",
            "having {a_column} that starts with '{value}'",
            "with '{value}' at the start of the {column}",
        ),
        ("whose {column} begins with '{value}'",),
    ),
    "contains": Wording(
        (
            "whose {column} contains '{value}'",
            "with '{value}' in the {column}",
            "where {column} contains '{value}'",
            "having '{value}' in the {column}",
            "with {a_column} containing '{value}'",
        ),
        ("whose {column} includes '{value}'",),
    ),
    "ends": Wording(
        (
            "whose {column} ends with '{value}'",
            "with {a_column} ending in '{value}'",
            "where {column} ends in '{value}'",
            "having {a_column} that ends with '{value}'",
            "with '{value}' at the end of the {column}",
        ),
        ("whose {column} finishes with '{value}'",),
    ),
}

ORDERS = {
    "ASC": Wording(
        (
            "sorted by {column} in ascending order",
            "ordered by {column} from lowest to highest",
            "by increasing {column}",
            "sorted by ascending {column}",
            "with the lowest {column} first",
        ),
        ("in ascending order of {column}", "sorted from the lowest to the highest {column}"),
    ),
    "DESC": Wording(
        (
            "sorted by {column} in descending order",
            "ordered by {column} from highest to lowest",
            "by decreasing {column}",
            "sorted by descending {column}",
            "with the highest {column} first",
        ),
        ("in descending order of {column}", "sorted from the highest to the lowest {column}"),
    ),
}

# Single words are the same for all splits.
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
