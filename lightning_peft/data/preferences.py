"""Make of the columns of a preference row two conversations that differ in what the assistant says last."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from enum import IntEnum
from typing import Any

from lightning_peft.data.conversation import BadRow, Message, Row
from lightning_peft.data.turns import HEAVIEST, read_turns


class Standing(IntEnum):
    """The part of a sample in a preference objective."""

    rejected = 0
    """The worse answer of a pair, or one that its label does not want."""
    chosen = 1
    """The better answer, or one that its label wants."""
    mismatched = 2
    """A prompt with the answer to another one, from which KTO takes the distance to the reference."""


LABELS = {"true": True, "1": True, "1.0": True, "yes": True, "false": False, "0": False, "0.0": False, "no": False}


def read_label(row: Row, column: str) -> bool:
    """Return whether the answer of a row is wanted. Raises `BadRow`."""
    value = row.values.get(column)
    found = LABELS.get(str(value).strip().lower()) if isinstance(value, bool | int | float | str) else None
    if found is None:
        raise BadRow(row.origin, "true or false (or 1 or 0)", value, column)
    return found


def read_margin(row: Row, column: str) -> float:
    """Return by how much the chosen answer of a row is to be ahead, a number or the text of one. Raises `BadRow`."""
    value = row.values.get(column)
    try:
        margin = math.nan if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        margin = math.nan
    if not abs(margin) <= HEAVIEST:
        raise BadRow(row.origin, "a finite number", value, column)
    return margin


def read_chosen_and_rejected(
    row: Row, chosen_column: str, rejected_column: str, prompt: list[Message] | None, is_raw: bool
) -> tuple[list[Message], list[Message]]:
    """Return the messages of both answers, each behind the same prompt, whose turns are not trained.

    Answers are texts, or lists of turns that may begin with the prompt. Without a prompt, the beginning that both share
    is the prompt; plain texts have one only where they are laid out as they stand. Raises `BadRow`.
    """
    columns = (chosen_column, rejected_column)
    values = [row.values.get(column) for column in columns]
    if isinstance(values[0], list) != isinstance(values[1], list):
        raise BadRow(row.origin, f"{chosen_column} and {rejected_column} both as text, or both as lists", values[1])
    if not isinstance(values[0], list):
        texts = [_text(value, row.origin, column) for value, column in zip(values, columns, strict=True)]
        if prompt is None:
            if not is_raw:
                raise BadRow.because(
                    row.origin,
                    "expected a prompt beside plain texts of chosen and rejected (data.prompt_column names its column; "
                    "data.layout=raw takes what both texts begin with)",
                )
            shared = shared_text(*texts)
            if not shared.strip():
                raise BadRow(row.origin, "texts of chosen and rejected that begin alike", texts[1], rejected_column)
            prompt, texts = [Message("user", shared)], [text[len(shared) :] for text in texts]
        answers = [[Message("assistant", text)] for text in texts]
    else:
        answers = [read_turns(value, row.origin, column) for value, column in zip(values, columns, strict=True)]
        if any(turns[0].role != "assistant" for turns in answers):
            shared_turns = _shared_turns(*answers)
            if answers[0][0] != answers[1][0] and all(turns[0].role != "assistant" for turns in answers):
                expected = f"a user message before the answers, the same in {chosen_column} and {rejected_column}"
                raise BadRow(row.origin, expected, answers[1][0].content, rejected_column)
            _check_prompt(prompt, shared_turns, row.origin, chosen_column)
            prompt, answers = shared_turns, [turns[len(shared_turns) :] for turns in answers]
    context = [replace(message, weight=0.0) if message.role == "assistant" else message for message in prompt or []]
    if not any(message.role == "user" for message in context):
        raise BadRow(row.origin, "a user message before the answers", [message.role for message in context])
    for turns, column in zip(answers, columns, strict=True):
        if turns[0].role not in ("assistant", "tool") or all(turn.role != "assistant" for turn in turns):
            raise BadRow(row.origin, "an answer to the messages that both begin with", turns[0].role, column)
    return context + answers[0], context + answers[1]


def _text(value: Any, origin: str, column: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BadRow(origin, "non-empty text, or a list of turns", value, column)
    return value


def shared_text(first: str, second: str) -> str:
    """Return what both texts begin with, up to the white space before the word in which they differ."""
    differ = (place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    stop = next(differ, min(len(first.rstrip()), len(second.rstrip())) - 1)
    spaces = list(re.finditer(r"\s+", first[:stop]))
    return first[: spaces[-1].start()] if spaces else ""


def _shared_turns(first: Sequence[Message], second: Sequence[Message]) -> list[Message]:
    """Return the turns that both begin with, so that each has an answer behind them."""
    last = min(
        max((i for i, turn in enumerate(turns) if turn.role == "assistant"), default=0) for turns in (first, second)
    )
    count = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), last)
    return list(first[: min(count, last)])


def _check_prompt(prompt: list[Message] | None, shared: list[Message], origin: str, column: str) -> None:
    """Raise `BadRow` where a row's own prompt is not among the turns that its answers begin with."""
    asked = {message.content.strip() for message in shared if message.role == "user"}
    for message in prompt or []:
        if message.role == "user" and message.content.strip() not in asked:
            raise BadRow(origin, "turns that begin with the row's prompt", message.content, column)
