"""Tools, and calls of them in any of the shapes in use, as `{"type": "function", "function": {name, arguments}}`."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from lightning_peft.data.conversation import BadRow, Row, json_in, read_json

CALL_ROLES = ("function_call", "tool_call")
"""Authors, in ShareGPT's way of writing, of turns whose text is a call."""
_CALL_KEYS = frozenset(("id", "type", "function", "index"))
EMPTY: tuple[Any, ...] = (None, "", [], {})
"""Values that say nothing."""
_FUNCTION_KEYS = frozenset(("name", "arguments", "parameters"))


def read_calls(turn: Mapping[str, Any], text: Any, name: str, origin: str, column: str) -> tuple[Any, ...]:
    """Return a turn's calls: those of its keys, or its text where its author is in `CALL_ROLES`. Raises `BadRow`."""
    given = {key: turn[key] for key in ("tool_calls", "function_call") if turn.get(key) not in EMPTY}
    if name.lower() in CALL_ROLES:
        if given:
            raise BadRow(origin, f"the call of a {name} as its text alone", next(iter(given.values())), column)
        given = {"content": text}
    if len(given) > 1:
        raise BadRow(origin, "calls as tool_calls or as function_call, not both", given, column)
    return tuple(
        _read_call(call, origin, column) for calls in given.values() for call in _listed(calls, origin, column)
    )


def unread_keys_of_calls(turn: Mapping[str, Any]) -> Iterator[str]:
    """Iterate over keys of the calls of a turn that mean nothing here."""
    name = turn.get("role") or turn.get("from")
    texts = (turn.get("content"), turn.get("value")) if isinstance(name, str) and name.lower() in CALL_ROLES else ()
    for calls in (turn.get("tool_calls"), turn.get("function_call"), *texts):
        try:
            listed = _listed(calls, "", "") if calls not in EMPTY else []
        except BadRow:  # the reading of its row will say so
            listed = []
        for call in listed:
            function = call.get("function") if isinstance(call, dict) else None
            own = _CALL_KEYS if isinstance(function, dict) else _CALL_KEYS | _FUNCTION_KEYS
            for values, known in ((call, own), (function, _FUNCTION_KEYS)):
                if isinstance(values, dict):
                    yield from (str(key) for key in values if key not in known and values[key] not in EMPTY)


def _listed(calls: Any, origin: str, column: str) -> list[Any]:
    try:
        calls = read_json(calls) if isinstance(calls, str) else calls
    except (ValueError, RecursionError) as error:
        raise BadRow(origin, f"tool calls as a list or as JSON ({error})", calls, column) from error
    return calls if isinstance(calls, list) else [calls]


def _read_call(call: Any, origin: str, column: str) -> Mapping[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(origin, "tool calls with a function of name and arguments", call, column)
    if (identity := call.get("id")) is not None and not isinstance(identity, str):
        raise BadRow(origin, "text as id of a tool call", identity, column)
    given = [function[key] for key in ("arguments", "parameters") if function.get(key) is not None]
    if len(given) > 1:
        raise BadRow(origin, "arguments or parameters of a tool call, not both", function, column)
    arguments = given[0] if given else {}
    if isinstance(arguments, str):
        try:
            arguments = read_json(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise BadRow(origin, f"JSON as arguments of a tool call ({error})", arguments, column) from error
    if not isinstance(arguments, dict):
        raise BadRow(origin, "an object as arguments of a tool call", arguments, column)
    shown = {} if identity is None else {"id": identity}
    return {**shown, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def read_tools(row: Row, column: str | None) -> list[dict[str, Any]] | None:
    """Return the tools that a row offers in a column, None where there are none. Raises `BadRow`."""
    value = row.values.get(column) if column is not None else None
    if isinstance(value, str) and value.strip():
        value = json_in(value, row.origin, "JSON", column)
    if value in EMPTY:
        return None
    given = value if isinstance(value, list) else [value]
    tools: list[Any] = [json_in(tool, row.origin, "JSON", column) if isinstance(tool, str) else tool for tool in given]
    if not all(isinstance(tool, dict) for tool in tools):
        raise BadRow(row.origin, "a list of tools, each an object", value, column)
    try:
        json.dumps(tools)
    except (TypeError, ValueError) as error:  # a date, or bytes
        raise BadRow(row.origin, f"tools that JSON can say ({error})", value, column) from error
    return tools


def has_null_property(tools: Any) -> bool:
    """Return whether a tool has a property without a schema, as no tool is written."""
    if isinstance(tools, list):
        return any(map(has_null_property, tools))
    if not isinstance(tools, dict):
        return False
    properties = tools.get("properties")
    is_here = isinstance(properties, dict) and None in properties.values()
    return is_here or any(map(has_null_property, tools.values()))
