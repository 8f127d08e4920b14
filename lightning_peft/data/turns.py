"""Read a turn of a chat row, in any of the shapes in use, as a message."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from lightning_peft.data.conversation import BadRow, Message, read_json
from lightning_peft.data.thoughts import OPENING, split_thought
from lightning_peft.data.tool_calls import CALL_ROLES, EMPTY, read_calls, unread_keys_of_calls

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    **dict.fromkeys(CALL_ROLES, "assistant"),
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "environment": "tool",
    "tool_response": "tool",
}
"""Names of a turn's author, those of ShareGPT among them."""
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
WEIGHT_COLUMN = "weight"
WEIGHT_KEYS = (WEIGHT_COLUMN, "train", "loss")
HEAVIEST = float(np.finfo(np.float32).max)
"""Largest factor of a loss."""
READ_KEYS = frozenset(
    ("role", "content", "from", "value", "tool_calls", "function_call", "name", "tool_call_id")
    + REASONING_KEYS
    + WEIGHT_KEYS
)
"""Keys of a turn that mean something here."""
OPTIONAL_KEYS = READ_KEYS - {"role", "content", "from", "value"}
"""Keys that `data.ignore_columns` may leave out."""
_PART_TYPES = frozenset(("text", "image", "image_url", "audio", "input_audio", "video", "file"))
_PART_KEYS = frozenset(("type", "text"))
_SAID = frozenset(("content", "value", "tool_calls", "function_call"))


def is_of_others(name: Any) -> bool:
    """Return whether a turn's author is known and not the assistant, whose turns alone are trained."""
    return isinstance(name, str) and ROLES.get(name.lower(), "assistant") != "assistant"


def is_turn(turn: Any) -> bool:
    """Return whether a value looks like a turn: an author that is known, and something said."""
    if not isinstance(turn, dict) or not turn.keys() & _SAID:
        return False
    name = turn.get("role") or turn.get("from")
    return isinstance(name, str) and name.lower() in ROLES


def turns_of(text: str) -> list[Any] | None:
    """Return the turns that a text holds as JSON; None for a text of any other kind, which stays as it is."""
    if not text.lstrip().startswith("["):
        return None
    try:
        turns = read_json(text)
    except (ValueError, RecursionError):
        return None
    return turns if isinstance(turns, list) and turns and all(map(is_turn, turns)) else None


def read_turns(turns: Any, origin: str, column: str) -> list[Message]:
    """Return the messages of a list of turns. Raises `BadRow`."""
    if not isinstance(turns, list) or not turns:
        raise BadRow(origin, "a list of messages", turns, column)
    return [_read_turn(turn, origin, column) for turn in turns]


def _read_turn(turn: Any, origin: str, column: str) -> Message:
    if not isinstance(turn, dict) or not ("role" in turn or "from" in turn):
        raise BadRow(origin, "messages with role and content (or from and value)", turn, column)
    name: Any = turn["role"] if turn.get("role") is not None else turn.get("from")
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise BadRow(origin, f"a role among {', '.join(ROLES)}", name, column)
    other = turn.get("from")
    if other is not None and (not isinstance(other, str) or ROLES.get(other.lower()) != role):
        raise BadRow(origin, f"one author of a turn, role={name!r}", other, column)
    if not turn.keys() & _SAID:
        raise BadRow(origin, "messages with role and content (or from and value)", turn, column)
    content, value = turn.get("content"), turn.get("value")
    if content is not None and value not in (None, content):
        raise BadRow(origin, "text as content or as value of a message, not both", value, column)
    content = value if content is None else content
    calls = read_calls(turn, content, name, origin, column)
    if calls and role != "assistant":
        raise BadRow(origin, "tool calls in turns of the assistant only", name, column)
    if name.lower() in CALL_ROLES or (content is None and calls):
        content = ""
    elif role == "tool" and content is not None and not isinstance(content, str) and not _are_parts(content):
        content = _as_json(content, origin, column)
    else:
        content = _joined(content, origin, column)
    if not isinstance(content, str) or (role == "assistant" and not content.strip() and not calls):
        raise BadRow(origin, f"non-empty text as content of each {name} message", content, column)
    reasoning, content = one_thought(_reasoning(turn, origin, column), content, origin, column)
    if reasoning is not None and role != "assistant":
        raise BadRow(origin, "a thought on turns of the assistant only", name, column)
    return Message(
        role,
        content,
        reasoning=reasoning,
        tool_calls=calls,
        name=_optional_text(turn, "name", origin, column),
        tool_call_id=_optional_text(turn, "tool_call_id", origin, column),
        weight=_weight(turn, role, origin, column),
    )


def unread_keys(turns: Iterable[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Iterate over keys of turns that mean nothing here: the name of each that holds something, and its place."""
    for turn in turns:
        yield from ((str(key), "turn") for key in turn if key not in READ_KEYS and turn[key] not in EMPTY)
        content = turn.get("content") or turn.get("value")
        if isinstance(content, list) and _are_parts(content):
            for part in content:
                yield from ((str(key), "part") for key in part if key not in _PART_KEYS and part[key] not in EMPTY)
        yield from ((key, "tool call") for key in unread_keys_of_calls(turn))


def _are_parts(content: Any) -> bool:
    parts = content if isinstance(content, list) else []
    kinds = [part.get("type") if isinstance(part, dict) else None for part in parts]
    return bool(kinds) and all(isinstance(kind, str) and kind in _PART_TYPES for kind in kinds)


def _as_json(result: Any, origin: str, column: str) -> str:
    try:
        return json.dumps(result, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow(origin, f"text or JSON as the result of a tool ({error})", result, column) from error


def _joined(content: Any, origin: str, column: str) -> Any:
    """Return the text of content that is given in parts."""
    if not _are_parts(content):
        return content
    for part in content:
        if part["type"] != "text" or not isinstance(part.get("text"), str):
            raise BadRow(origin, "parts of type text in the content of a message", part, column)
    return "".join(part["text"] for part in content)


def _reasoning(turn: dict[str, Any], origin: str, column: str) -> str | None:
    given = {key: turn[key] for key in REASONING_KEYS if turn.get(key) not in (None, "")}
    if not given:
        return None
    values = list(given.values())
    if not all(isinstance(value, str) for value in values):
        raise BadRow(origin, f"text as {next(iter(given))} of a message", values[0], column)
    if len(set(values)) > 1:
        raise BadRow(origin, "one thought in a message", given, column)
    return values[0] if values[0].strip() else None


def one_thought(reasoning: str | None, content: str, origin: str, column: str) -> tuple[str | None, str]:
    """Return the thought that a key holds, and the content without the same one."""
    if reasoning is None or OPENING.match(content) is None:
        return reasoning, content
    inline, rest = split_thought(content)
    if inline is not None and inline != reasoning.strip():
        raise BadRow(origin, "one thought in a message, and its content begins with another", reasoning, column)
    return reasoning, content if inline is None else rest


def _weight(turn: dict[str, Any], role: str, origin: str, column: str) -> float:
    weight = 1.0
    for key in WEIGHT_KEYS:
        value = turn.get(key)
        if value is None:
            continue
        if not isinstance(value, int | float) or not 0 <= value <= HEAVIEST:
            raise BadRow(origin, f"true, false or a number from 0 on as {key} of a message", value, column)
        if value and role != "assistant" and key != "weight":
            raise BadRow(origin, f"{key} on turns of the assistant only, no other is trained", value, column)
        weight *= value
    if weight > HEAVIEST:
        given = {key: turn[key] for key in WEIGHT_KEYS if turn.get(key) is not None}
        raise BadRow(origin, f"a product of at most {HEAVIEST:.3g} as weight of a message", given, column)
    return float(weight)


def _optional_text(turn: dict[str, Any], key: str, origin: str, column: str) -> str | None:
    value = turn.get(key)
    if value is not None and not isinstance(value, str):
        raise BadRow(origin, f"text as {key} of a message", value, column)
    return value
