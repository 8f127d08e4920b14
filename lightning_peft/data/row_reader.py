"""From a row of a file or data set to the messages of a conversation."""

import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from lightning_peft.data.config import DataConfig, Format, Layout, RowKind
from lightning_peft.data.conversation import BadRow, Conversation, Message, Row, shown, without_absent_keys
from lightning_peft.data.formats import (
    FORMATS,
    SIDE_COLUMNS,
    USUAL_NAMES,
    RowFormat,
    Shape,
    check_format,
    filled,
    optional_text,
    parsed,
    template_columns,
    turns_of,
)
from lightning_peft.data.preferences import read_label, read_margin
from lightning_peft.data.token_rows import read_tokens
from lightning_peft.data.turns import HEAVIEST, OPTIONAL_KEYS, is_of_others, read_turns, unread_keys

WEIGHT_COLUMN = "weight"
WITHOUT_TURNS = (Format.text, Format.tokens)
"""Rows that no chat template lays out."""

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
        """The row with the turns that it holds as JSON, as tables of text do, in place of their text."""
        found = {
            column: turns
            for column in self._turn_columns
            if isinstance(text := row.values.get(column), str) and (turns := turns_of(text)) is not None
        }
        return Row({**row.values, **found}, row.origin) if found else row

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
    check_format(config.format)
    there = ", ".join(columns)
    kind = config.rows or RowKind.answers
    formats = {format: row_format for format, row_format in FORMATS.items() if row_format.rows is kind}
    _refuse_other_rows(columns, config, kind)
    renamed = {
        option: format
        for format, row_format in formats.items()
        for option in row_format.options
        if getattr(config, option) is not None
    }
    sides = dict.fromkeys(name for row_format in formats.values() for name in row_format.side)
    side_options = [f"{name}_column" for name in sides if getattr(config, f"{name}_column") is not None]
    side_options += ["margin_column"] if config.margin_column is not None else []
    for option in [*renamed, *side_options]:
        if (name := getattr(config, option)) not in columns:
            raise ValueError(f"data.{option}={name}: the rows have no such column, only {there}")
    wanted = {config.format} - {str(Format.auto)} | set(renamed.values())
    if config.prompt_template is not None:
        return _templated_reader(columns, config, wanted)
    if len(wanted) > 1:
        options = [f"data.{option}" for option in renamed]
        raise ValueError(
            f"data.format={config.format} and {', '.join(options)}: these belong to different formats "
            f"({', '.join(sorted(wanted))}); give those of one"
        )
    for format in wanted or formats:
        for candidate in (alternatives := _alternatives(FORMATS[format], config)):
            if all(name in columns for name in candidate):
                return _reader(format, candidate, columns, config)
    if wanted:
        needed = " or ".join(" and ".join(names) for names in alternatives)
        raise ValueError(f"data.format={format}: needs a column {needed}; the rows have {there}")
    if kind is RowKind.pairs:
        raise ValueError(
            f"data.format=auto: no pairs of answers, the columns are {there}; name them with data.chosen_column and "
            "data.rejected_column"
        )
    if kind is RowKind.labelled:
        raise ValueError(
            f"data.format=auto: no labelled answers, the columns are {there}; name them with data.prompt_column, "
            "data.completion_column and data.label_column"
        )
    raise ValueError(
        f"data.format=auto: no known shape of row, the columns are {there}; "
        "name two with data.prompt_column and data.completion_column, "
        "or one with data.text_column or data.messages_column"
    )


OBJECTIVES_OF = {
    RowKind.answers: "objective=sft",
    RowKind.pairs: "objective=dpo (or ipo, simpo, orpo, reward)",
    RowKind.labelled: "objective=kto",
}
"""Words of the command line that train on each kind of rows."""


def _refuse_other_rows(columns: Collection[str], config: DataConfig, kind: RowKind) -> None:
    """Raise ValueError where rows, or options, are those of another kind than the objective takes."""
    if config.format != Format.auto and (asked := FORMATS[config.format].rows) is not kind:
        raise ValueError(
            f"data.format={config.format}: {OBJECTIVES_OF[kind]} takes {kind.name}, and {OBJECTIVES_OF[asked]} "
            f"trains on {config.format} rows"
        )
    read = {option for row_format in FORMATS.values() if row_format.rows is kind for option in row_format.options}
    read |= {f"{name}_column" for row_format in FORMATS.values() if row_format.rows is kind for name in row_format.side}
    for other, row_format in FORMATS.items():
        for option in row_format.options:
            if option not in read and getattr(config, option) is not None:
                raise ValueError(
                    f"data.{option}={getattr(config, option)}: names a column of {other} rows, which "
                    f"{OBJECTIVES_OF[row_format.rows]} trains on"
                )
    if config.margin_column is not None and kind is not RowKind.pairs:
        raise ValueError(f"data.margin_column={config.margin_column}: names a column of pairs, for objective=reward")
    named = {getattr(config, option) for option in read} | set(config.ignore_columns)
    fits = any(
        all(name in columns for name in names)
        for row_format in FORMATS.values()
        if row_format.rows is kind
        for names in _alternatives(row_format, config)
    )
    both = {"chosen", "rejected"} <= set(columns) and not {"chosen", "rejected"} & named
    if kind is not RowKind.pairs and both:
        raise ValueError(
            f"chosen and rejected answers: {OBJECTIVES_OF[RowKind.pairs]} trains on them; {OBJECTIVES_OF[kind]} takes "
            f"{kind.name}"
            + (
                ", as with data.completion_column=chosen data.ignore_columns=[rejected]"
                if kind is RowKind.answers
                else ""
            )
        )
    if fits or kind is RowKind.answers or config.prompt_template is not None:
        return
    for row_format in FORMATS.values():
        if row_format.rows is not kind and any(set(names) <= set(columns) for names in row_format.usual_columns):
            what = "pairs of chosen and rejected answers" if kind is RowKind.pairs else "answers with a label"
            raise ValueError(
                f"rows of {', '.join(columns)}: {OBJECTIVES_OF[kind]} takes {what}; these are for "
                f"{OBJECTIVES_OF[_kind_of(columns, kind)]}"
            )


def _kind_of(columns: Collection[str], wanted: RowKind) -> RowKind:
    """Return the most special kind, other than `wanted`, whose usual columns are there."""
    for kind in (RowKind.pairs, RowKind.labelled, RowKind.answers):
        alternatives = [names for row_format in FORMATS.values() if row_format.rows is kind
                        for names in row_format.usual_columns]  # fmt: skip
        if kind is not wanted and any(set(names) <= set(columns) for names in alternatives):
            return kind
    return RowKind.answers


def _templated_reader(columns: Collection[str], config: DataConfig, wanted: Iterable[str]) -> RowReader:
    """The reader of rows whose prompt is `data.prompt_template`, filled with their columns."""
    source = config.prompt_template or ""
    if config.rows is RowKind.pairs and config.prompt_column is None:
        answers = (config.chosen_column or "chosen", config.rejected_column or "rejected")
        missing = [name for name in (*sorted(template_columns(source)), *answers) if name not in columns]
        if missing:
            raise ValueError(f"data.prompt_template: the rows have no column {missing[0]}, only {', '.join(columns)}")
        return _reader(Format.preference, answers, columns, config)
    if config.rows is RowKind.labelled or set(wanted) - {Format.prompt_completion} or config.prompt_column is not None:
        raise ValueError(
            f"data.prompt_template={source!r}: makes the prompt of prompt/completion rows; give data.completion_column "
            "with it, and no other format or column of the prompt"
        )
    answer = config.completion_column or "completion"
    for name in sorted(template_columns(source)) + [answer]:
        if name not in columns:
            option = "completion_column" if name == answer else "prompt_template"
            raise ValueError(f"data.{option}: the rows have no column {name}, only {', '.join(columns)}")
    return _reader(Format.prompt_completion, (answer, answer), columns, config)


def _reader(format: str, names: tuple[str, ...], columns: Collection[str], config: DataConfig) -> RowReader:
    side = {}
    for name in FORMATS[format].side:
        column = getattr(config, f"{name}_column") or USUAL_NAMES.get(name, name)
        templated = config.prompt_template is not None and column in template_columns(config.prompt_template)
        if column not in names and not templated and column not in config.ignore_columns:
            side[name] = column
    for name in dict.fromkeys((*FORMATS[format].side, *SIDE_COLUMNS)):
        if getattr(config, f"{name}_column") is not None and name not in side:
            value = getattr(config, f"{name}_column")
            raise ValueError(f"data.{name}_column={shown(value)}: rows of data.format={format} have none")
    read = {*names, *(template_columns(config.prompt_template) if config.prompt_template is not None else ())}
    if taken := [name for name in config.ignore_columns if name in read]:
        raise ValueError(
            f"data.ignore_columns: names {', '.join(taken)}, which rows of data.format={format} are made of"
        )
    if config.prompt_template is not None:
        side.pop("input", None)
        side.pop("prompt", None)
    if config.teacher_prompt is not None:
        if format in WITHOUT_TURNS:
            raise ValueError(f"data.teacher_prompt: stands before a prompt, and rows of data.format={format} have none")
        if missing := sorted(template_columns(config.teacher_prompt, "teacher_prompt") - set(columns)):
            raise ValueError(f"data.teacher_prompt: the rows have no column {missing[0]}, only {', '.join(columns)}")
    return RowReader(
        columns=names,
        side=side,
        prompt_template=config.prompt_template,
        format=format,
        system_prompt=config.system_prompt,
        ignored=frozenset(config.ignore_columns),
        margin=config.margin_column,
        teacher_prompt=config.teacher_prompt,
        is_raw=config.layout is Layout.raw,
        lists_unread=config.source in ("files", "hub"),
    )
