"""Calls of tools where a chat template writes the tools, and leaves calls to the text of an answer."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Calls = Sequence[Mapping[str, Any]]


def _as_json(calls: Calls) -> str:
    """Write calls as SmolLM 3 and the Hermes models do."""
    told = (json.dumps(call["function"], ensure_ascii=False) for call in calls)
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in told)


def _as_python(calls: Calls) -> str:
    """Write calls as LFM 2 does."""
    told = []
    for call in calls:
        function = call["function"]
        arguments = ", ".join(f"{name}={_literal(value)}" for name, value in function["arguments"].items())
        told.append(f"{function['name']}({arguments})")
    return f"<|tool_call_start|>[{', '.join(told)}]<|tool_call_end|>"


def _literal(value: Any) -> str:
    if isinstance(value, str):
        for letter, escaped in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n"), ("\r", "\\r")):
            value = value.replace(letter, escaped)
        return f"'{value}'"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)


_WRITERS: dict[str, tuple[Callable[[Calls], str], str]] = {
    "<tool_call>": (_as_json, "\n"),
    "<|tool_list_start|>": (_as_python, ""),
}
"""The writer of calls, and the text between words and calls, by a mark in the prompt that offers tools."""


def writer_of(prompt: str) -> Callable[[str, Calls], str] | None:
    """Return what makes the text of an answer from its words and its calls.

    prompt: a rendering with tools, which tells how they are to be called. The result is None where it does not tell.
    """
    found = next((writer for mark, writer in _WRITERS.items() if mark in prompt), None)
    if found is None:
        return None
    write, between = found
    return lambda words, calls: f"{words}{between}{write(calls)}" if words.strip() else write(calls)
