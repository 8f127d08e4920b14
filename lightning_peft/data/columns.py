"""What the columns of a row say: the messages of a conversation, and what of the row nobody reads."""

import json
import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from lightning_peft.data.config import Format, RowKind
from lightning_peft.data.conversation import BadRow, Conversation, Message, Row, without_absent_keys
from lightning_peft.data.formats import FORMATS, Shape, filled, optional_text, parsed, template_columns, turns_of
from lightning_peft.data.preferences import read_label, read_margin
from lightning_peft.data.token_rows import read_tokens
from lightning_peft.data.turns import HEAVIEST, OPTIONAL_KEYS, is_of_others, read_turns, unread_keys

WEIGHT_COLUMN = "weight"
WITHOUT_TURNS = (Format.text, Format.tokens)
"""Rows that no chat template lays out."""
_WITH_ANSWER = (Format.instruction, Format.prompt_completion, Format.labelled)
"""Rows of a prompt and the answer to it."""

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


@dataclass(frozen=True, kw_only=True)
class RowReader(Shape):
    """Reads the messages of rows that have one format and the same columns."""

    format: str
    """A key of `FORMATS`."""
    system_prompt: str | None = None
    ignored: frozenset[str] = frozenset()
    """Names of columns and keys of turns that are left out on request."""
    margin: str | None = None
    """Column of the margin of preference rows."""
    lists_unread: bool = True
    """Whether columns that nobody reads are of interest; those of generated rows belong to their task."""

    def __call__(self, row: Row) -> Conversation:
        """The conversation of a row, the system prompt first if it brings none. Raises `BadRow`."""
        row = self.parsed(row)
        if _has_null_property(row.values.get(self.side.get("tools", ""))):  # exported from Arrow as JSON
            row = Row(without_absent_keys(row.values), row.origin)
        unread = self._unread(row)
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

    def ignores(self, row: Row) -> dict[str, bool]:
        """Return which of the names that are left out on request are in a row, as a column or a key of a turn."""
        if not self.ignored:
            return {}
        values = self.parsed(row).values
        lists = (turns for column in self._turn_columns if isinstance(turns := values.get(column), list))
        keys = {key for turns in lists for turn in turns if isinstance(turn, dict) for key in turn}
        return {name: name in row.values or name in keys for name in sorted(self.ignored)}

    def parsed(self, row: Row) -> Row:
        """The row with the turns that it holds as JSON, as tables of text do, in place of their text.

        What is to be continued, or answers a text, is text, whatever it says.
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
        """Columns that may hold lists of turns."""
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
        return Conversation(self._weighted(row, messages), self._tools(row))

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
            value = parsed(row, value, "JSON or a list of question and answer pairs", column)
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

    def _tools(self, row: Row) -> list[dict[str, Any]] | None:
        column = self.side.get("tools")
        value = row.values.get(column) if column is not None else None
        if isinstance(value, str) and value.strip():
            value = parsed(row, value, "JSON", column)
        if value in (None, "", [], {}):
            return None
        tools = value if isinstance(value, list) else [value]
        tools = [parsed(row, tool, "JSON", column) if isinstance(tool, str) else tool for tool in tools]
        if not all(isinstance(tool, dict) for tool in tools):
            raise BadRow(row.origin, "a list of tools, each an object", value, column)
        try:
            json.dumps(tools)
        except (TypeError, ValueError) as error:  # a date, or bytes
            raise BadRow(row.origin, f"tools that JSON can say ({error})", value, column) from error
        return tools

    def _weighted(self, row: Row, messages: list[Message]) -> list[Message]:
        if FORMATS[self.format].rows is not RowKind.answers:
            for message in messages:
                if message.weight not in (0.0, 1.0):
                    raise BadRow(row.origin, "turns of weight 0 or 1 in rows of preferences", message.weight)
            return messages
        weight = self._row_weight(row)
        return messages if weight == 1 else [replace(message, weight=message.weight * weight) for message in messages]

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
        """Columns that are read, or ignored on request."""
        is_weighted = self.format != Format.text and FORMATS[self.format].rows is RowKind.answers
        weight = (WEIGHT_COLUMN,) if is_weighted else ()
        return self._read_columns.union(self.ignored, weight)

    def _unread(self, row: Row) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What of a row nobody reads: the names that stop a run, and those that are only listed."""
        if not self.lists_unread:
            return (), ()
        unread: list[str] = []
        listed: list[str] = []
        for name, value in row.values.items():
            if name not in self._passed and value not in (None, "", [], {}):
                number = isinstance(value, int | float) and name.lower() not in _WEIGHTY
                (listed if number or _LISTED.fullmatch(name) else unread).append(f"column {name!r}")
        for column in self._turn_columns:
            if isinstance(turns := row.values.get(column), list):
                turns = [turn for turn in turns if isinstance(turn, dict)]
                for name, place in dict.fromkeys(unread_keys(turns)):
                    if name not in self.ignored:
                        (listed if _LISTED.fullmatch(name) else unread).append(f"key {name!r} of a {place}")
                roles = [(turn.get("role") or turn.get("from"), turn.get(WEIGHT_COLUMN)) for turn in turns]
                if WEIGHT_COLUMN not in self.ignored:
                    others = dict.fromkeys(role for role, weight in roles if weight and is_of_others(role))
                    listed += [f"key 'weight' of a turn of the {role}" for role in others]
        return tuple(unread), tuple(listed)


def _has_null_property(tools: Any) -> bool:
    """Return whether a tool has a property without a schema, as no tool is written."""
    if isinstance(tools, list):
        return any(map(_has_null_property, tools))
    if not isinstance(tools, dict):
        return False
    properties = tools.get("properties")
    is_here = isinstance(properties, dict) and None in properties.values()
    return is_here or any(map(_has_null_property, tools.values()))
