"""The columns of a row, and keys of its turns, that nobody reads."""

import re
from collections.abc import Collection, Iterable
from enum import Enum
from functools import lru_cache
from typing import Any

from lightning_peft.data.conversation import Row
from lightning_peft.data.turns import WEIGHT_COLUMN, is_of_others, unread_keys

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_TRAINS = ("weight", "loss", "train", "mask", "label", "think", "thought", "reasoning", "target", "margin")
"""Beginnings of words that say what is trained, and how: a column with such a name is never beside the point."""
_NUMBERED = frozenset(
    "id ids idx index uuid guid hash score scores rating ratings timestamp date url urls count".split()
)
"""Last words of names that identify a row, count it or rate it, whatever stands before them."""
_COUNTS = frozenset("num n nb score rating".split())
"""First words of names that count or rate, as in num_turns."""
_SORTED = frozenset(
    "type kind category categories level difficulty split model domain dataset subset seed number length len tokens "
    "quality version license".split()
)
"""Last words of names that sort rows."""
_BESIDE = frozenset(
    "source sources data_source source_dataset task_source dataset_name origin author task tasks task_name model_name "
    "lang topic topics tag tags time created created_at updated_at created_date upvotes downvotes votes likes stars "
    "rank reward turn turns toxic toxicity redacted deleted synthetic perplexity confidence helpfulness correctness "
    "coherence complexity verbosity tree_state review_result emojis country state hashed_ip".split()
)
"""Whole names of columns in which data sets describe their rows."""
_RECORDS = frozenset("meta metadata header openai_moderation detoxify_moderation".split())
"""Names of columns that hold several descriptions, at any length."""
_OF_PANDAS = re.compile(r"(?:unnamed: \d+|__index_level_\d+__)?", re.IGNORECASE)
"""Columns of row numbers."""
_LONGEST = 100
"""Characters of a text that sorts rows; a longer one, or one of several lines, is a part of a conversation."""


class _Says(Enum):
    """The meaning of a name for its value: none, so that the value may be trained on; that it is beside the point; or
    that it is so where it is short."""

    anything = "anything"
    short = "short"
    aside = "aside"


@lru_cache(maxsize=4096)
def _says(name: str) -> _Says:
    words = [word.lower() for word in _WORD.findall(name)]
    if any(word.startswith(_TRAINS) for word in words):
        return _Says.anything
    if _OF_PANDAS.fullmatch(name) or "_".join(words) in _RECORDS:
        return _Says.aside
    if words and (words[-1] in _NUMBERED | _SORTED or words[0] in _COUNTS or "_".join(words) in _BESIDE):
        return _Says.short
    return _Says.anything


def is_listed(name: str, value: Any = None) -> bool:
    """Return whether a column, or a key of a turn, holds an id, a score or the like, which no conversation needs."""
    says = _says(name)
    if says is not _Says.short:
        return says is _Says.aside
    if isinstance(value, str):
        return len(value) <= _LONGEST and "\n" not in value.strip() or name.lower().endswith(("url", "hash"))
    return not (isinstance(value, list) and len(value) > 1 and name.lower().endswith(("ids", "tokens")))


def unread_names(
    row: Row,
    passed: Collection[str],
    turn_columns: Iterable[str],
    ignored: Collection[str],
    scored: Collection[str] = (),
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what of a row nobody reads: the names that stop a run, and those that are only listed.

    passed: columns that are read, or ignored on request; turn_columns: those that may hold turns; ignored: keys of
    turns that are left out on request; scored: columns that the task scores answers by.
    """
    unread: list[str] = []
    listed: list[str] = []
    for name, value in row.values.items():
        if name not in passed and value not in (None, "", [], {}):
            (listed if name in scored or is_listed(name, value) else unread).append(f"column {name!r}")
    for column in turn_columns:
        if isinstance(turns := row.values.get(column), list):
            turns = [turn for turn in turns if isinstance(turn, dict)]
            for name, place in dict.fromkeys(unread_keys(turns)):
                if name not in ignored:
                    (listed if is_listed(name) else unread).append(f"key {name!r} of a {place}")
            roles = [(turn.get("role") or turn.get("from"), turn.get(WEIGHT_COLUMN)) for turn in turns]
            if WEIGHT_COLUMN not in ignored:
                others = dict.fromkeys(role for role, weight in roles if weight and is_of_others(role))
                listed += [f"key 'weight' of a turn of the {role}" for role in others]
    return tuple(unread), tuple(listed)
