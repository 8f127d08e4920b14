"""The conversation that a row becomes: its messages, with the tools it offers."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

TEXT_ROLE = "text"
"""Role of the only message of a plain text row: no chat template, every token trained."""


@dataclass(frozen=True)
class Message:
    """One turn. Only an assistant's turn has reasoning, tool calls and a weight."""

    role: str
    """`system`, `user`, `assistant`, `tool`, or `TEXT_ROLE`."""
    content: str
    reasoning: str | None = None
    """The thought before the answer."""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    """Calls as `{"type": "function", "function": {"name", "arguments"}}`, `arguments` an object."""
    name: str | None = None
    tool_call_id: str | None = None
    weight: float = 1.0
    """Factor of the loss of the turn's tokens; 0 trains none of them."""


@dataclass(frozen=True)
class Tokens:
    """The content of a row that was tokenised before: equally long lists."""

    input_ids: list[int]
    labels: list[int]
    """Each the token itself where it is trained, else -100."""
    weights: list[float] | None = None
    """Factor of each token's loss; None where all are 1."""


class Conversation(list[Message]):
    """The messages of a row in their order, the tools the assistant may call, and what nobody read of the row."""

    def __init__(
        self,
        messages: Iterable[Message] = (),
        tools: list[dict[str, Any]] | None = None,
        unread: tuple[str, ...] = (),
        listed: tuple[str, ...] = (),
        rejected: "Conversation | None" = None,
        wanted: bool | None = None,
        tokens: Tokens | None = None,
        margin: float | None = None,
        taught: "Conversation | None" = None,
    ) -> None:
        super().__init__(messages)
        self.tools = tools
        self.unread = unread
        """Columns and keys of turns that may hold what was to be trained on."""
        self.listed = listed
        """Columns and keys of turns that hold ids, scores and the like."""
        self.rejected = rejected
        """The same prompt with the worse answer, of preference rows."""
        self.wanted = wanted
        """True where the answer is one to give, of labelled rows."""
        self.tokens = tokens
        """The tokens of a row without messages."""
        self.taught = taught
        """The conversation that a teacher reads in place of this one, with the same answers."""
        self.source = ""
        """Name of the source of a mixture that the row is of; empty where there is one source."""
        self.origin = ""
        """The place where its row was read: "train.jsonl line 3"; empty for a conversation that is of no file."""
        self.margin = margin
        """The lead that its answer is to have over the rejected one, of preference rows that give one."""

    def before(self, index: int) -> "Conversation":
        """Return the messages before message `index`, with the same tools."""
        return self.at_its_place(Conversation(self[:index], self.tools))

    def at_its_place(self, other: "Conversation") -> "Conversation":
        """Mark another conversation as made of the same row, and return it."""
        other.origin, other.source = self.origin, self.source
        return other

    @property
    def first_trained(self) -> int:
        """Return the index of the first answer that is trained; the number of messages where there is none."""
        trained = (i for i, message in enumerate(self) if message.role == "assistant" and message.weight > 0)
        return next(trained, len(self))

    @property
    def last_answer(self) -> int | None:
        """Return the index of the last message of the assistant; None where there is none."""
        return next((index for index in range(len(self) - 1, -1, -1) if self[index].role == "assistant"), None)

    @property
    def trailing(self) -> int:
        """Return the number of messages after the last answer, which are no part of any sample."""
        if self and self[-1].role == "assistant":
            return 0
        return 0 if (last := self.last_answer) is None else len(self) - 1 - last


def tools_of(messages: Iterable[Message]) -> list[dict[str, Any]] | None:
    """Return the tools that come with the messages; None for a plain list of them."""
    return messages.tools if isinstance(messages, Conversation) else None


@dataclass(frozen=True)
class Row:
    """A row as it was read, with all its columns, and where: "train.jsonl line 3"."""

    values: dict[str, Any]
    origin: str


def without_absent_keys(values: dict[str, Any]) -> dict[str, Any]:
    """Return a row of Arrow without the keys of objects in it that hold null.

    All objects of a column have the same keys in Arrow, so that a tool, or a call, has null for those of the others.
    """
    return {name: _dense(value) if isinstance(value, dict | list) else value for name, value in values.items()}


def _dense(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _dense(inner) for key, inner in value.items() if inner is not None}
    return [_dense(inner) for inner in value] if isinstance(value, list) else value


def read_json(text: str) -> Any:
    """Return what a JSON text says. Raises ValueError, also for a key twice in an object, as one would be dropped."""
    return json.loads(text, object_pairs_hook=_with_each_key_once)


def _with_each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        name = next(name for place, (name, _) in enumerate(pairs) if name in dict(pairs[:place]))
        raise ValueError(f"key {name!r} twice in one object")
    return values


class BadRow(ValueError):
    """A row that cannot be used; the message has its place, the column, what was expected and what is there."""

    def __init__(self, origin: str, expected: str, got: Any, column: str | None = None):
        kind = "" if got is None or isinstance(got, str) else f" ({type(got).__name__})"
        place = origin if column is None else f"{origin}, column {column!r}"
        super().__init__(f"{place}: expected {expected}, got {shown(got)}{kind}")

    @classmethod
    def because(cls, origin: str, reason: str) -> "BadRow":
        """Return the error of a row that another error, or a sentence, is about."""
        error = cls.__new__(cls)
        line = " ".join(f"{origin}: {reason}".splitlines())
        ValueError.__init__(error, line.encode("utf-8", "backslashreplace").decode())
        return error


def shown(value: Any) -> str:
    """Return a value on one line of at most 80 characters, fit for any terminal."""
    text = repr(value)
    text = text if len(text) <= 80 else text[:77] + "..."
    return text.encode("utf-8", "backslashreplace").decode()


def json_in(text: str, origin: str, expected: str, column: str | None) -> Any:
    """Return what a column's JSON holds. Raises `BadRow` for other text."""
    try:
        return read_json(text)
    except (ValueError, RecursionError) as error:
        raise BadRow(origin, f"{expected} ({error})", text, column) from error
