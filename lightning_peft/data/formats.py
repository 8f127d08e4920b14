"""The table of row formats: the columns of each, and how its rows become the messages of a conversation."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from typing import Any

from lightning_peft.data.config import Format, RowKind
from lightning_peft.data.conversation import (
    TEXT_ROLE,
    BadRow,
    Conversation,
    Message,
    Row,
    json_in,
    without_absent_keys,
)
from lightning_peft.data.preferences import read_chosen_and_rejected, read_label, read_margin
from lightning_peft.data.row_template import filled, template_columns
from lightning_peft.data.token_rows import COLUMNS as TOKEN_COLUMNS
from lightning_peft.data.token_rows import read_tokens
from lightning_peft.data.tool_calls import has_null_property, read_tools
from lightning_peft.data.turns import HEAVIEST, OPTIONAL_KEYS, WEIGHT_COLUMN, one_thought, read_turns, turns_of
from lightning_peft.data.unread import unread_names

_BESIDE_TURNS = ("system", "history", "input", "tools")
SIDE_COLUMNS = (*_BESIDE_TURNS, "reasoning")
"""Columns that a row may hold beside its prompt and answer; `data.system_column` and so on rename them."""
USUAL_NAMES = {"reasoning": "reasoning_content"}
"""Columns with another usual name than their own: a `reasoning` column is as often a switch, or a rating."""

WITHOUT_TURNS = (Format.text, Format.tokens)
"""Rows that no chat template lays out."""
_WITH_ANSWER = (Format.instruction, Format.prompt_completion, Format.labelled)
"""Rows of a prompt and the answer to it."""

Answers = list[Message] | tuple[list[Message], list[Message]]
"""The messages of a row; of a pair, those up to the chosen and those up to the rejected answer."""


@dataclass(frozen=True)
class Shape:
    """The columns of rows of one format, and the way their prompts are made."""

    columns: tuple[str, ...]
    """Columns of the format, under the names that they have here."""
    side: dict[str, str]
    """Column of each of `SIDE_COLUMNS` that the format has."""
    prompt_template: str | None = None
    teacher_prompt: str | None = None
    """The text that a teacher alone reads before the conversation."""
    is_raw: bool = False
    """True where texts stand as they are, without a chat template."""


def text_of(row: Row, column: str) -> str:
    """Return the text of a column. Raises `BadRow` for a row without."""
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
        return _asked([*context, *read_turns(answer, row.origin, answer_column)], row, shape)
    thought, content = one_thought(thought, text_of(row, answer_column), row.origin, answer_column)
    return _asked([*context, Message("assistant", content, reasoning=thought)], row, shape)


def _asked(messages: list[Message], row: Row, shape: Shape) -> list[Message]:
    """Return the messages. Raises `BadRow` where no user asks for the first trained answer, not in a history either."""
    has_history = row.values.get(shape.side.get("history", "")) not in (None, "", [])
    before = takewhile(lambda message: message.role != "assistant" or message.weight == 0, messages)
    if not has_history and not any(message.role == "user" for message in before):
        raise BadRow(row.origin, "a user message before the answer", messages[0].role, shape.columns[0])
    return messages


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
    """Alternatives, of which the first that is there is taken."""
    options: tuple[str, ...]
    """Option of `data` that renames each column, as many as an alternative has columns; empty if they are fixed."""
    read: Callable[[Row, Shape], Answers]
    """Reads a row; raises `BadRow` for one that cannot be read. The last column of labelled rows is the label."""
    side: tuple[str, ...] = ()
    """Names of `SIDE_COLUMNS` that belong to the format."""
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
"""Formats in the order in which they are looked for: the alpaca data set has a `text` column beside its instructions.

`FORMATS["mine"] = RowFormat(...)` adds one from outside the package.
"""


@dataclass(frozen=True, kw_only=True)
class RowReader(Shape):
    """Reads the messages of rows that have one format and the same columns."""

    format: str
    """A key of `FORMATS`."""
    system_prompt: str | None = None
    ignored: frozenset[str] = frozenset()
    """Names of columns and keys of turns that are left out on request."""
    scored: tuple[str, ...] = ()
    """Columns that `data.task` scores answers by."""
    margin: str | None = None
    """Column of the margin of preference rows."""
    lists_unread: bool = True
    """True where columns that nobody reads are of interest; those of generated rows belong to their task."""

    def __call__(self, row: Row) -> Conversation:
        """Return the conversation of a row, the system prompt first if it brings none. Raises `BadRow`."""
        row = self._spelled_out(row)
        names = (self._passed, self._turn_columns, self.ignored, self.scored)
        unread = unread_names(row, *names) if self.lists_unread else ((), ())
        if self.ignored & OPTIONAL_KEYS:
            row = self._without_ignored_keys(row)
        if self.format == Format.tokens:
            return Conversation((), None, *unread, tokens=read_tokens(row, self._row_weight(row)))
        row_format = FORMATS[self.format]
        messages = row_format.read(row, self)
        if isinstance(messages, tuple):
            chosen, rejected = (self._conversation(row, answer) for answer in messages)
            margin = None if self.margin is None else read_margin(row, self.margin)
            return Conversation(chosen, chosen.tools, *unread, rejected=rejected, margin=margin)
        if self.format == Format.text:
            return Conversation(messages, None, *unread)
        found = self._conversation(row, messages)
        taught = None if self.teacher_prompt is None else self._taught(row, found)
        wanted = read_label(row, self.columns[-1]) if row_format.rows is RowKind.labelled else None
        return Conversation(found, found.tools, *unread, wanted=wanted, taught=taught)

    def asked(self, row: Row) -> Conversation:
        """Return the conversation that a row without an answer asks to go on with. Raises `BadRow`.

        All that may stand beside a prompt is read as in training, and what is no part of it is listed.
        """
        row, (column,) = self._spelled_out(row), self.columns
        if self.format == Format.messages or isinstance(row.values.get(column), list):
            _refuse_input(row, self, column)
            messages = read_turns(row.values.get(column), row.origin, column)
        else:
            messages = [Message("user", _with_input(row, self))]
        found = self._conversation(row, messages)
        unread, listed = unread_names(row, self._read_columns, self._turn_columns, self.ignored)
        return Conversation(found, found.tools, unread, listed)

    def ignores(self, row: Row) -> dict[str, bool]:
        """Return which of the names that are left out on request are in a row, as a column or a key of a turn."""
        if not self.ignored:
            return {}
        values = self._with_turns(row).values
        lists = (turns for column in self._turn_columns if isinstance(turns := values.get(column), list))
        keys = {key for turns in lists for turn in turns if isinstance(turn, dict) for key in turn}
        return {name: name in row.values or name in keys for name in sorted(self.ignored)}

    def _spelled_out(self, row: Row) -> Row:
        """Return the row with its turns as lists, and its tools without the properties that Arrow adds."""
        row = self._with_turns(row)
        if has_null_property(row.values.get(self.side.get("tools", ""))):  # exported from Arrow as JSON
            return Row(without_absent_keys(row.values), row.origin)
        return row

    def _with_turns(self, row: Row) -> Row:
        """Return the row with the turns that it holds as JSON, as tables of text do, in place of their text.

        A text that is to be continued, or that answers a text, stays text, whatever it says.
        """
        if self.format in WITHOUT_TURNS or self.is_raw:
            return row
        found: dict[str, Any] = {}
        for column in self._turn_columns:
            if self.format in _WITH_ANSWER and column in self.columns[1:] and not self._asks_in_turns(row, found):
                continue
            text = row.values.get(column)
            if isinstance(text, str) and text[:1] in "[ \t\r\n" and (turns := turns_of(text)) is not None:
                found[column] = turns
        return Row({**row.values, **found}, row.origin) if found else row

    def _asks_in_turns(self, row: Row, found: dict[str, Any]) -> bool:
        prompt = self.columns[0]
        return self.prompt_template is None and (prompt in found or isinstance(row.values.get(prompt), list))

    def _without_ignored_keys(self, row: Row) -> Row:
        keys, values = self.ignored & OPTIONAL_KEYS, dict(row.values)
        for column in self._turn_columns:
            if isinstance(turns := values.get(column), list):
                values[column] = [
                    {key: value for key, value in turn.items() if key not in keys} if isinstance(turn, dict) else turn
                    for turn in turns
                ]
        return Row(values, row.origin)

    @cached_property
    def _turn_columns(self) -> tuple[str, ...]:
        """Return the columns that may hold lists of turns."""
        return (*self.columns, *(self.side[name] for name in ("prompt", "history") if name in self.side))

    def _conversation(self, row: Row, messages: list[Message]) -> Conversation:
        messages = self._history(row) + messages
        system = optional_text(row, self.side.get("system"))
        brings_one = any(message.role == "system" for message in messages)
        if system and brings_one:
            raise BadRow(row.origin, "one system message, in a turn or in the column", system, self.side["system"])
        if not system and not brings_one and self.system_prompt is not None:
            messages = [Message("system", self.system_prompt), *messages]
        elif system:
            messages = [Message("system", system), *messages]
        return Conversation(self._weighted(row, messages), read_tools(row, self.side.get("tools")))

    def _taught(self, row: Row, found: Conversation) -> Conversation:
        """Return the conversation behind the text that a teacher alone reads, as a part of its system message."""
        text = filled(self.teacher_prompt or "", row, "teacher_prompt")
        first = found[0]
        if self.is_raw:
            return Conversation([replace(first, content=text + first.content), *found[1:]], found.tools)
        if first.role == "system":
            return Conversation([replace(first, content=f"{text}\n\n{first.content}"), *found[1:]], found.tools)
        return Conversation([Message("system", text), *found], found.tools)

    def _history(self, row: Row) -> list[Message]:
        column = self.side.get("history")
        value = row.values.get(column) if column is not None else None
        if isinstance(value, str) and value.strip():
            value = json_in(value, row.origin, "JSON or a list of question and answer pairs", column)
        if value in (None, "", []):
            return []
        assert column is not None
        if not isinstance(value, list):
            raise BadRow(row.origin, "a list of question and answer pairs", value, column)
        if all(isinstance(turn, dict) for turn in value):
            return [replace(turn, weight=0.0) for turn in read_turns(value, row.origin, column)]
        messages = []
        for pair in value:
            if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                raise BadRow(row.origin, "pairs of question and answer", pair, column)
            messages += [Message("user", pair[0]), Message("assistant", pair[1], weight=0.0)]
        return messages

    def _weighted(self, row: Row, messages: list[Message]) -> list[Message]:
        if FORMATS[self.format].rows is not RowKind.answers:
            for message in messages:
                if message.weight not in (0.0, 1.0):
                    raise BadRow(row.origin, "turns of weight 0 or 1 in rows of preferences", message.weight)
            return messages
        weight = self._row_weight(row)
        if weight == 1:
            return messages
        if (product := max(message.weight for message in messages) * weight) > HEAVIEST:
            expected = f"weights of row and turn whose product is at most {HEAVIEST:.3g}"
            raise BadRow(row.origin, expected, product, WEIGHT_COLUMN)
        return [replace(message, weight=message.weight * weight) for message in messages]

    def _row_weight(self, row: Row) -> float:
        value = row.values.get(WEIGHT_COLUMN)
        if value in (None, "") or WEIGHT_COLUMN in self._read_columns or WEIGHT_COLUMN in self.ignored:
            return 1.0
        try:
            weight = float(value)
        except (TypeError, ValueError, OverflowError):
            weight = -1.0
        if not 0 <= weight <= HEAVIEST:
            raise BadRow(row.origin, "a number from 0 on", value, WEIGHT_COLUMN)
        return weight

    @cached_property
    def _read_columns(self) -> frozenset[str]:
        read = {*self.columns, *self.side.values(), *FORMATS[self.format].copies}
        read |= template_columns(self.teacher_prompt, "teacher_prompt") if self.teacher_prompt else set()
        read |= set() if self.margin is None else {self.margin}
        return frozenset(read | (template_columns(self.prompt_template) if self.prompt_template else set()))

    @cached_property
    def _passed(self) -> frozenset[str]:
        """Return the columns that are read, or ignored on request."""
        is_weighted = self.format != Format.text and FORMATS[self.format].rows is RowKind.answers
        weight = (WEIGHT_COLUMN,) if is_weighted else ()
        return self._read_columns.union(self.ignored, weight)


NAMES_ELSEWHERE = {
    **dict.fromkeys(("sharegpt", "chat_template", "chatml", "openai", "chat", "conversational"), Format.messages),
    "alpaca": Format.instruction,
    **dict.fromkeys(("completion", "pretrain", "pretraining", "raw"), Format.text),
    **dict.fromkeys(("dpo", "ranking", "pairwise"), Format.preference),
    "kto": Format.labelled,
    **dict.fromkeys(("tokenized", "pretokenized", "input_ids"), Format.tokens),
}
"""What other tools call the formats."""


def check_format(name: str, key: str = "data.format") -> None:
    """Raise ValueError for a format that nobody has added."""
    if name not in (Format.auto, *FORMATS):
        meant = NAMES_ELSEWHERE.get(name.lower().partition(".")[0])
        ours = f"use {key}={meant}, or " if meant is not None else ""
        raise ValueError(
            f"{key}={name}: no such format; {ours}choose one of auto, {', '.join(FORMATS)}, or give the module that "
            "adds it, as imports=[my_rows]"
        )
