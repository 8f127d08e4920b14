"""From one turn of a chat row, in any of the shapes in use, to a message."""

import json
from collections.abc import Mapping
from typing import Any

from lightning_peft.data.conversation import BadRow, Message, read_json
from lightning_peft.data.template import split_thought

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
"""Names of a turn's author, those of ShareGPT among them."""
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_THOUGHTS_BEGIN = ("<think>", "<|channel>thought", "[THINK]")
WEIGHT_KEYS = ("weight", "train", "loss")
READ_KEYS = frozenset(
    ("role", "content", "from", "value", "tool_calls", "function_call", "name", "tool_call_id")
    + REASONING_KEYS
    + WEIGHT_KEYS
)
"""Keys of a turn that mean something here."""
OPTIONAL_KEYS = READ_KEYS - {"role", "content", "from", "value"}
"""Those that `data.ignore_columns` may leave out."""


def is_of_others(name: Any) -> bool:
    """Return whether a turn's author is known and not the assistant, whose turns alone are trained."""
    return isinstance(name, str) and ROLES.get(name.lower(), "assistant") != "assistant"


def read_turns(turns: Any, origin: str, column: str) -> list[Message]:
    """The messages of a list of turns. Raises `BadRow`."""
    if not isinstance(turns, list) or not turns:
        raise BadRow(origin, "a list of messages", turns, column)
    return [_read_turn(turn, origin, column) for turn in turns]


def _read_turn(turn: Any, origin: str, column: str) -> Message:
    if not isinstance(turn, dict) or not ("role" in turn or "from" in turn):
        raise BadRow(origin, "messages with role and content (or from and value)", turn, column)
    name = turn["role"] if turn.get("role") is not None else turn.get("from")
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise BadRow(origin, f"a role among {', '.join(ROLES)}", name, column)
    other = turn.get("from")
    if other is not None and (not isinstance(other, str) or ROLES.get(other.lower()) != role):
        raise BadRow(origin, f"one author of a turn, role={name!r}", other, column)
    if not turn.keys() & {"content", "value", "tool_calls", "function_call"}:
        raise BadRow(origin, "messages with role and content (or from and value)", turn, column)
    content = turn["content"] if turn.get("content") is not None else turn.get("value")
    if role == "tool" and isinstance(content, dict | list) and not _are_parts(content):
        content = json.dumps(content, ensure_ascii=False)
    calls: list[Any] = []
    if name == "function_call":
        calls, content = _json_list(content, origin, column), ""
    else:
        calls = _as_list(turn.get("tool_calls")) or _as_list(turn.get("function_call"))
    if calls and role != "assistant":
        raise BadRow(origin, "tool calls in turns of the assistant only", name, column)
    content = "" if content is None and calls else _joined(content, origin, column)
    if not isinstance(content, str) or (role == "assistant" and not content.strip() and not calls):
        raise BadRow(origin, f"non-empty text as content of each {name} message", content, column)
    reasoning, content = _one_thought(_reasoning(turn, origin, column), content, origin, column)
    if reasoning is not None and role != "assistant":
        raise BadRow(origin, "a thought on turns of the assistant only", name, column)
    return Message(
        role,
        content,
        reasoning=reasoning,
        tool_calls=tuple(_read_call(call, origin, column) for call in calls),
        name=_optional_text(turn, "name", origin, column),
        tool_call_id=_optional_text(turn, "tool_call_id", origin, column),
        weight=_weight(turn, role, origin, column),
    )


def _are_parts(content: Any) -> bool:
    return isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content)


def _joined(content: Any, origin: str, column: str) -> Any:
    """The text of content that is given in parts."""
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


def _one_thought(reasoning: str | None, content: str, origin: str, column: str) -> tuple[str | None, str]:
    """The thought that a key holds, and the content without the same one."""
    if reasoning is None or not content.lstrip().startswith(_THOUGHTS_BEGIN):
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
        if not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise BadRow(origin, f"true, false or a number from 0 on as {key} of a message", value, column)
        if value and role != "assistant" and key != "weight":
            raise BadRow(origin, f"{key} on turns of the assistant only, no other is trained", value, column)
        weight *= float(value)
    return weight


def _optional_text(turn: dict[str, Any], key: str, origin: str, column: str) -> str | None:
    value = turn.get(key)
    if value is not None and not isinstance(value, str):
        raise BadRow(origin, f"text as {key} of a message", value, column)
    return value


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _json_list(text: Any, origin: str, column: str) -> list[Any]:
    try:
        return _as_list(read_json(text)) if isinstance(text, str) else _as_list(text)
    except ValueError as error:
        raise BadRow(origin, f"JSON as value of a function_call ({error})", text, column) from error


def _read_call(call: Any, origin: str, column: str) -> Mapping[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(origin, "tool calls with a function of name and arguments", call, column)
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = read_json(arguments) if arguments.strip() else {}
        except ValueError as error:
            raise BadRow(origin, f"JSON as arguments of a tool call ({error})", arguments, column) from error
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise BadRow(origin, "an object as arguments of a tool call", arguments, column)
    identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}}
