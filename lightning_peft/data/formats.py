"""The table of row formats: the columns of each, and how the messages of a conversation are read from them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, UndefinedError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lightning_peft.data.config import Format, RowKind
from lightning_peft.data.conversation import TEXT_ROLE, BadRow, Message, Row, read_json
from lightning_peft.data.preferences import read_chosen_and_rejected
from lightning_peft.data.token_rows import COLUMNS as TOKEN_COLUMNS
from lightning_peft.data.turns import is_turn, one_thought, read_turns

_BESIDE_TURNS = ("system", "history", "input", "tools")
SIDE_COLUMNS = (*_BESIDE_TURNS, "reasoning")
"""What a row may hold beside its prompt and answer; `data.system_column` and so on rename them."""
USUAL_NAMES = {"reasoning": "reasoning_content"}
"""Their columns where those are named otherwise: a `reasoning` column is as often a switch, or a rating."""

Answers = list[Message] | tuple[list[Message], list[Message]]
"""The messages of a row; of a pair, those up to the chosen and those up to the rejected answer."""


@dataclass(frozen=True)
class Shape:
    """The columns of rows of one format, and how their prompts are made."""

    columns: tuple[str, ...]
    """Those of the format, under the names that they have here."""
    side: dict[str, str]
    """Column of each of `SIDE_COLUMNS` that the format has."""
    prompt_template: str | None = None
    teacher_prompt: str | None = None
    """What a teacher alone reads before the conversation."""
    is_raw: bool = False
    """Whether texts stand as they are, without a chat template."""


def text_of(row: Row, column: str) -> str:
    """Return the text of a column. Raises `BadRow` where there is none."""
    if column not in row.values:
        raise BadRow(row.origin, f"a column {column!r}", ", ".join(row.values))
    value = row.values[column]
    if not isinstance(value, str) or not value.strip():
        raise BadRow(row.origin, "non-empty text", value, column)
    return value


def optional_text(row: Row, column: str | None) -> str:
    """Return the text of a column, empty where there is none. Raises `BadRow` for what is no text."""
    value = row.values.get(column) if column is not None else None
    if value is not None and not isinstance(value, str):
        raise BadRow(row.origin, "text", value, column)
    return value if value and value.strip() else ""


def _read_chat(row: Row, shape: Shape) -> list[Message]:
    (column,) = shape.columns
    messages = read_turns(row.values.get(column), row.origin, column)
    roles = [message.role for message in messages if message.role != "system"]
    if "assistant" not in roles:
        raise BadRow(row.origin, "at least one assistant message", ", ".join(roles), column)
    if roles[0] != "user":
        raise BadRow(row.origin, "a user message before the first assistant message", roles[0], column)
    return messages


def _read_pair(row: Row, shape: Shape) -> list[Message]:
    prompt_column, answer_column = shape.columns[:2]
    prompt, answer = row.values.get(prompt_column), row.values.get(answer_column)
    if isinstance(prompt, list) and shape.prompt_template is None:
        _refuse_input(row, shape, prompt_column)
        context = [replace(turn, weight=0.0) for turn in read_turns(prompt, row.origin, prompt_column)]
    else:
        context = [Message("user", _with_input(row, shape))]
    thought = optional_text(row, shape.side.get("reasoning")) or None
    if isinstance(answer, list):
        if thought is not None:
            expected = f"no thought beside the turns of {answer_column}, which may hold theirs"
            raise BadRow(row.origin, expected, thought, shape.side["reasoning"])
        return context + read_turns(answer, row.origin, answer_column)
    thought, content = one_thought(thought, text_of(row, answer_column), row.origin, answer_column)
    return [*context, Message("assistant", content, reasoning=thought)]


def _with_input(row: Row, shape: Shape, column: str | None = None) -> str:
    if shape.prompt_template is not None:
        return filled(shape.prompt_template, row)
    prompt, context = text_of(row, column or shape.columns[0]), optional_text(row, shape.side.get("input"))
    return f"{prompt}\n\n{context}" if context else prompt


def _refuse_input(row: Row, shape: Shape, column: str) -> None:
    """Raise `BadRow` where a row has an input beside a prompt of turns, which has no place for it."""
    if given := optional_text(row, shape.side.get("input")):
        raise BadRow(row.origin, f"no input beside the turns of {column}", given, shape.side["input"])


def _read_text(row: Row, shape: Shape) -> list[Message]:
    (column,) = shape.columns
    return [Message(TEXT_ROLE, text_of(row, column))]


def _no_messages(row: Row, shape: Shape) -> list[Message]:
    return []


def _read_both(row: Row, shape: Shape) -> tuple[list[Message], list[Message]]:
    column = shape.side.get("prompt")
    value = row.values.get(column) if column is not None else None
    prompt: list[Message] | None = None
    if shape.prompt_template is not None or isinstance(value, str):
        prompt = [Message("user", _with_input(row, shape, column))]
    elif value is not None:
        _refuse_input(row, shape, column or "prompt")
        prompt = read_turns(value, row.origin, column or "prompt")
    return read_chosen_and_rejected(row, shape.columns[0], shape.columns[1], prompt, shape.is_raw)


@dataclass(frozen=True)
class RowFormat:
    """Columns a row shape needs and how its messages are read from them."""

    usual_columns: tuple[tuple[str, ...], ...]
    """Alternatives, the first that is there is taken."""
    options: tuple[str, ...]
    """Option of `data` that renames each column, as many as an alternative has columns; empty if they are fixed."""
    read: Callable[[Row, Shape], Answers]
    """What a row says; raises `BadRow` for one that cannot be read. Of labelled rows the last column is the label."""
    side: tuple[str, ...] = ()
    """Those of `SIDE_COLUMNS` that belong to it."""
    copies: tuple[str, ...] = ()
    """Columns that repeat the others, as alpaca's `text` does."""
    rows: RowKind = RowKind.answers


FORMATS: dict[str, RowFormat] = {
    Format.messages: RowFormat(
        (("messages",), ("conversations",)), ("messages_column",), _read_chat, side=("system", "tools")
    ),
    Format.instruction: RowFormat((("instruction", "output"),), (), _read_pair, side=SIDE_COLUMNS, copies=("text",)),
    Format.prompt_completion: RowFormat(
        (("prompt", "completion"),), ("prompt_column", "completion_column"), _read_pair, side=SIDE_COLUMNS
    ),
    Format.text: RowFormat((("text",),), ("text_column",), _read_text),
    Format.tokens: RowFormat((("input_ids",),), (), _no_messages, copies=TOKEN_COLUMNS),
    Format.preference: RowFormat(
        (("chosen", "rejected"),),
        ("chosen_column", "rejected_column"),
        _read_both,
        side=("prompt", *_BESIDE_TURNS),
        rows=RowKind.pairs,
    ),
    Format.labelled: RowFormat(
        (("prompt", "completion", "label"),),
        ("prompt_column", "completion_column", "label_column"),
        _read_pair,
        side=SIDE_COLUMNS,
        rows=RowKind.labelled,
    ),
}
"""In the order in which they are looked for: the alpaca data set has a `text` column beside its instructions.

`FORMATS["mine"] = RowFormat(...)` adds one from outside the package.
"""


def turns_of(text: str) -> list[Any] | None:
    """The turns that a text holds as JSON; None for a text of any other kind, which says what it says."""
    if not text.lstrip().startswith("["):
        return None
    try:
        turns = read_json(text)
    except (ValueError, RecursionError):
        return None
    return turns if isinstance(turns, list) and turns and all(map(is_turn, turns)) else None


def parsed(row: Row, text: str, expected: str, column: str | None) -> Any:
    """Return what a column's JSON holds. Raises `BadRow` for other text."""
    try:
        return read_json(text)
    except (ValueError, RecursionError) as error:
        raise BadRow(row.origin, f"{expected} ({error})", text, column) from error


@lru_cache
def _row_template(source: str) -> Any:
    strict = {"undefined": StrictUndefined, "finalize": _written}
    return ImmutableSandboxedEnvironment(keep_trailing_newline=True, **strict).from_string(source)


def _written(value: Any) -> Any:
    """What a row template puts into a prompt. Raises ValueError for nothing, which would be the word None or nan."""
    if value is None or value != value:
        raise ValueError("a column is empty; {{ column or '' }} writes nothing then")
    return value


@lru_cache
def template_columns(source: str, option: str = "prompt_template") -> set[str]:
    """The columns that a template of `data` names. Raises ValueError where it is no Jinja template."""
    try:
        return meta.find_undeclared_variables(ImmutableSandboxedEnvironment().parse(source))
    except TemplateSyntaxError as error:
        raise ValueError(f"data.{option}={source!r}: not a Jinja template ({error})") from error


def filled(source: str, row: Row, option: str = "prompt_template") -> str:
    """Return what a template of `data` makes of a row. Raises `BadRow`."""
    try:
        prompt = _row_template(source).render(row.values)
    except UndefinedError as error:
        hint = "{{ column | default('') }} takes rows without one"
        raise BadRow.because(row.origin, f"data.{option} cannot be filled in ({error}; {hint})") from error
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise BadRow.because(row.origin, f"data.{option} cannot be filled in ({error})") from error
    if not prompt.strip():
        raise BadRow(row.origin, f"text from data.{option}", prompt)
    return prompt


def check_format(name: str, key: str = "data.format") -> None:
    """Raise ValueError for a format that nobody has added."""
    if name not in (Format.auto, *FORMATS):
        raise ValueError(
            f"{key}={name}: no such format; choose one of auto, {', '.join(FORMATS)}, or give the module that adds it, "
            "as imports=[my_rows]"
        )
