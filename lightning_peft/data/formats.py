"""From a row of a file or data set to the messages of a conversation."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from lightning_peft.data.config import DataConfig, Format

TEXT_ROLE = "text"
"""Role of the only message of a plain text row: no chat template, every token trained."""


@dataclass(frozen=True)
class Message:
    role: str
    """`system`, `user`, `assistant`, or `TEXT_ROLE`."""
    content: str


@dataclass(frozen=True)
class Row:
    """A row as it was read, with all its columns, and where: "train.jsonl line 3"."""

    values: dict[str, Any]
    origin: str


class BadRow(ValueError):
    """A row that cannot be used: where it is, which column, what was expected, what is there."""

    def __init__(self, origin: str, expected: str, got: Any, column: str | None = None):
        shown = repr(got) if len(repr(got)) <= 80 else repr(got)[:77] + "..."
        kind = "" if got is None or isinstance(got, str) else f" ({type(got).__name__})"
        place = origin if column is None else f"{origin}, column {column!r}"
        super().__init__(f"{place}: expected {expected}, got {shown}{kind}")


ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}


def _text(row: Row, column: str) -> str:
    if column not in row.values:
        raise BadRow(row.origin, f"a column {column!r}", ", ".join(row.values))
    value = row.values[column]
    if not isinstance(value, str) or not value.strip():
        raise BadRow(row.origin, "non-empty text", value, column)
    return value


def _read_chat(row: Row, columns: tuple[str, ...]) -> list[Message]:
    (column,) = columns
    turns = row.values.get(column)
    if not isinstance(turns, list) or not turns:
        raise BadRow(row.origin, "a list of messages", turns, column)
    messages = []
    for turn in turns:
        if not isinstance(turn, dict) or not ({"role", "content"} <= turn.keys() or {"from", "value"} <= turn.keys()):
            raise BadRow(row.origin, "messages with role and content (or from and value)", turn, column)
        role, content = (turn["role"], turn["content"]) if "role" in turn else (turn["from"], turn["value"])
        if role not in ROLES:
            raise BadRow(row.origin, f"a role among {', '.join(ROLES)}", role, column)
        if not isinstance(content, str) or (ROLES[role] == "assistant" and not content.strip()):
            raise BadRow(row.origin, f"non-empty text as content of each {role} message", content, column)
        messages.append(Message(ROLES[role], content))
    roles = [message.role for message in messages if message.role != "system"]
    if "assistant" not in roles:
        raise BadRow(row.origin, "at least one assistant message", ", ".join(roles), column)
    if roles[0] != "user":
        raise BadRow(row.origin, "a user message before the first assistant message", roles[0], column)
    return messages


def _read_instruction(row: Row, columns: tuple[str, ...]) -> list[Message]:
    instruction, output = (_text(row, column) for column in columns)
    context = row.values.get("input")
    if context is not None and not isinstance(context, str):
        raise BadRow(row.origin, "text", context, "input")
    prompt = f"{instruction}\n\n{context}" if context and context.strip() else instruction
    return [Message("user", prompt), Message("assistant", output)]


def _read_prompt_completion(row: Row, columns: tuple[str, ...]) -> list[Message]:
    prompt, completion = (_text(row, column) for column in columns)
    return [Message("user", prompt), Message("assistant", completion)]


def _read_text(row: Row, columns: tuple[str, ...]) -> list[Message]:
    (column,) = columns
    return [Message(TEXT_ROLE, _text(row, column))]


@dataclass(frozen=True)
class RowFormat:
    """Columns a row shape needs and how its messages are read from them."""

    usual_columns: tuple[tuple[str, ...], ...]
    """Alternatives, the first that is there is taken."""
    options: tuple[str, ...]
    """Option of `data` that renames each column, as many as an alternative has columns; empty if they are fixed."""
    read: Callable[[Row, tuple[str, ...]], list[Message]]


FORMATS = {
    Format.messages: RowFormat((("messages",), ("conversations",)), ("messages_column",), _read_chat),
    Format.instruction: RowFormat((("instruction", "output"),), (), _read_instruction),
    Format.prompt_completion: RowFormat(
        (("prompt", "completion"),), ("prompt_column", "completion_column"), _read_prompt_completion
    ),
    Format.text: RowFormat((("text",),), ("text_column",), _read_text),
}
"""In the order in which they are looked for: the alpaca data set has a `text` column beside its instructions."""


@dataclass(frozen=True)
class RowReader:
    """Reads the messages of rows that have one format and the same columns."""

    format: Format
    columns: tuple[str, ...]
    system_prompt: str | None

    def __call__(self, row: Row) -> list[Message]:
        """The conversation of a row, the system prompt first if it brings none. Raises `BadRow`."""
        messages = FORMATS[self.format].read(row, self.columns)
        if self.system_prompt is None or messages[0].role in ("system", TEXT_ROLE):
            return messages
        return [Message("system", self.system_prompt), *messages]


def _alternatives(row_format: RowFormat, config: DataConfig) -> list[tuple[str, ...]]:
    named = [getattr(config, option) for option in row_format.options]
    if not named:
        return list(row_format.usual_columns)
    return list(
        dict.fromkeys(
            tuple(name or usual for name, usual in zip(named, columns, strict=True))
            for columns in row_format.usual_columns
        )
    )


def row_reader(columns: Collection[str], config: DataConfig) -> RowReader:
    """The reader for rows with these columns, by `data.format` and the column options, else by their names.

    Raises ValueError where an option names a column that is not there, or no format fits.
    """
    there = ", ".join(columns)
    renamed = {
        option: format
        for format, row_format in FORMATS.items()
        for option in row_format.options
        if getattr(config, option) is not None
    }
    for option in renamed:
        if (name := getattr(config, option)) not in columns:
            raise ValueError(f"data.{option}={name}: the rows have no such column, only {there}")
    wanted = {config.format} - {Format.auto} | set(renamed.values())
    if len(wanted) > 1:
        options = [f"data.{option}" for option in renamed]
        raise ValueError(
            f"data.format={config.format.value} and {', '.join(options)}: these belong to different formats "
            f"({', '.join(sorted(format.value for format in wanted))}); give those of one"
        )
    for format in wanted or FORMATS:
        for candidate in (alternatives := _alternatives(FORMATS[format], config)):
            if all(name in columns for name in candidate):
                return RowReader(format, candidate, config.system_prompt)
    if wanted:
        needed = " or ".join(" and ".join(names) for names in alternatives)
        raise ValueError(f"data.format={format.value}: needs a column {needed}; the rows have {there}")
    raise ValueError(
        f"data.format=auto: no known shape of row, the columns are {there}; "
        "name two with data.prompt_column and data.completion_column, "
        "or one with data.text_column or data.messages_column"
    )
