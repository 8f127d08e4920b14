"""Find the SQL in an answer and run it against the right one."""

import re

from lightning_peft.tasks.text_to_sql.grammar.database import DatabasePair, QueryError, is_ordered, same_result

# WITH opens a statement only as a common table expression; in prose it is an ordinary word.
STATEMENT = re.compile(r"\b(?:SELECT|WITH\s+(?:RECURSIVE\s+)?\w+\s*(?:\([^)]*\)\s*)?AS\s*\()", re.IGNORECASE)
CAPITALS = re.compile(r"\bSELECT\b")
STATEMENT_AT_LINE = re.compile(
    r"^[ \t>*`]*(?:(?:SQL|SQLite|Answer|Query)\s*:\s*`*)?" + STATEMENT.pattern[2:], re.I | re.M
)
FENCE = re.compile(r"```[ \t]*\w*[ \t]*\n?(.*?)(?:```|\Z)", re.DOTALL)
QUOTED_OR_END = re.compile(r"'(?:[^']|'')*'|\"[^\"]*\"|;|\n\s*\n|<\|")
CONTINUATION = re.compile(
    r"\s*(?:from|where|join|inner|left|right|full|outer|cross|on|using|group|order|having|limit|offset|union|intersect|except"
    r"|select|and|or|not|in|is|like|between|exists|case|when|then|else|end|as|desc|asc|[-+*/=<>(),|%]|\.)(?:\b|\W|$)",
    re.IGNORECASE,
)
OPEN_ENDED = re.compile(
    r"(?:[,(=<>+*/|-]|\b(?:select|distinct|from|where|join|on|by|having|limit|and|or|not|in|like|between|union|all"
    r"|intersect|except|case|when|then|else|as))\s*$",
    re.IGNORECASE,
)


def extract_sql(text: str) -> str:
    """Return an answer's first statement: out of ``` fences and prose, up to `;`, a blank line or the prose after it.

    The result is empty if there is no SELECT or WITH.
    """
    for fenced in FENCE.findall(text):
        if STATEMENT.search(fenced):
            text = fenced
            break
    # "select" is also an English word: a statement stands at the beginning of a line, or at least in capitals.
    at_line = STATEMENT_AT_LINE.search(text)
    start = STATEMENT.search(text, at_line.start()) if at_line else CAPITALS.search(text) or STATEMENT.search(text)
    if start is None:
        return ""
    in_backticks = text[: start.start()].endswith("`")
    statement = text[start.start() :]
    if in_backticks:
        statement = statement.split("`")[0]
    for mark in QUOTED_OR_END.finditer(statement):
        if mark.group()[0] not in "'\"":
            statement = statement[: mark.start()]
            break
    return _without_prose_after(statement)


def _without_prose_after(statement: str) -> str:
    lines = statement.split("\n")
    kept = lines[:1]
    for line in lines[1:]:
        so_far = "\n".join(kept)
        is_open = so_far.count("(") > so_far.count(")") or OPEN_ENDED.search(so_far)
        if not (is_open or CONTINUATION.match(line)):
            break
        kept.append(line)
    return "\n".join(kept).strip()


def execution_match(answer: str, gold: str, databases: DatabasePair) -> bool:
    """Return whether `answer` returns what `gold` does on both databases, in the same order if `gold` has ORDER BY."""
    try:
        results = databases.run(answer)
    except QueryError:
        return False
    pairs = zip(databases.run(gold), results, strict=True)
    return all(same_result(expected, result, is_ordered(gold)) for expected, result in pairs)
