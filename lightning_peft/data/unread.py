"""What of a row nobody reads."""

import re
from collections.abc import Collection, Iterable

from lightning_peft.data.conversation import Row
from lightning_peft.data.turns import WEIGHT_COLUMN, is_of_others, unread_keys

_LISTED = re.compile(
    r"(?:.*_)?(?:id|ids|idx|index|uuid|hash|scores?|ratings?|sources?|origin|category|categories|level|difficulty|type|"
    r"kind|task|tasks|lang|language|split|date|time|timestamp|created|created_at|updated_at|url|license|tokens|length|"
    r"len|model|meta|_?metadata|topics?|tags?|quality|domain|dataset|version|title|author|subject|subset|seed|schema|"
    r"number|count|num_turns)|(?:unnamed: \d+|__index_level_\d+__)?",
    re.IGNORECASE,
)
"""Names of columns that carry no part of a conversation, those that pandas gives its row numbers among them."""
_WEIGHTY = frozenset(("weight", "weights", "train", "loss", "mask", "label", "labels", "target", "margin"))
"""Numbers under these names change what is trained."""


def unread_names(
    row: Row, passed: Collection[str], turn_columns: Iterable[str], ignored: Collection[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what of a row nobody reads: the names that stop a run, and those that are only listed.

    passed: columns that are read, or ignored on request; turn_columns: those that may hold turns; ignored: keys of
    turns that are left out on request.
    """
    unread: list[str] = []
    listed: list[str] = []
    for name, value in row.values.items():
        if name not in passed and value not in (None, "", [], {}):
            number = isinstance(value, int | float) and name.lower() not in _WEIGHTY
            (listed if number or _LISTED.fullmatch(name) else unread).append(f"column {name!r}")
    for column in turn_columns:
        if isinstance(turns := row.values.get(column), list):
            turns = [turn for turn in turns if isinstance(turn, dict)]
            for name, place in dict.fromkeys(unread_keys(turns)):
                if name not in ignored:
                    (listed if _LISTED.fullmatch(name) else unread).append(f"key {name!r} of a {place}")
            roles = [(turn.get("role") or turn.get("from"), turn.get(WEIGHT_COLUMN)) for turn in turns]
            if WEIGHT_COLUMN not in ignored:
                others = dict.fromkeys(role for role, weight in roles if weight and is_of_others(role))
                listed += [f"key 'weight' of a turn of the {role}" for role in others]
    return tuple(unread), tuple(listed)
