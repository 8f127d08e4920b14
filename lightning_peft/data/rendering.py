"""Render a conversation as texts in which each assistant turn stands as it will be generated.

Generation sees the conversation before a turn as the chat template renders it then, with the generation prompt. Most
templates only append, so one rendering of the whole conversation holds every turn in that form. Some rewrite earlier
turns (they drop old thoughts, or move the system message); a turn that the whole rendering does not hold in its form
gets a text of its own.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import lru_cache
from typing import Any

from lightning_peft.data.config import Reasoning
from lightning_peft.data.conversation import Message, tools_of
from lightning_peft.data.end_tokens import EndTokens
from lightning_peft.data.history import EXACT_TURNS, History
from lightning_peft.data.template import ChatTemplate, ChatTemplateError
from lightning_peft.data.thoughts import CLOSING, EMPTY_THOUGHT, OPENED, OPENING, without_thoughts

log = logging.getLogger(__name__)


class TokenKind(IntEnum):
    """The kind of a trained token."""

    none = 0
    answer = 1
    reasoning = 2
    tool_call = 3
    end = 4


@dataclass(frozen=True)
class Rules:
    """The rules that decide which parts of a conversation are trained."""

    train_on: frozenset[TokenKind] = frozenset(
        (TokenKind.answer, TokenKind.reasoning, TokenKind.tool_call, TokenKind.end)
    )
    last_turn_only: bool = False
    reasoning: Reasoning = Reasoning.keep


@dataclass(frozen=True)
class Span:
    """An assistant turn in a text: where it starts, and its parts, each with the character at which it stops."""

    start: int
    parts: tuple[tuple[int, TokenKind], ...]
    weight: float = 1.0

    @property
    def stop(self) -> int:
        return self.parts[-1][0]


@dataclass(frozen=True)
class Rendered:
    """A text to be tokenised, and the turns to be trained in it."""

    text: str
    spans: tuple[Span, ...]


class ConversationRenderer:
    """Renders conversations under one template and rules."""

    def __init__(self, template: ChatTemplate, special: Sequence[str], added: Sequence[str], rules: Rules) -> None:
        """Keep the rules. special: tokens that may end a turn; added: all tokens beside the vocabulary."""
        self._template = template
        self._rules = rules
        self._ends = (EndTokens(special), EndTokens(added))
        self._begins = _begins_pattern(special)
        self._next_role: dict[bool, str] = {}
        self._dropped_of: dict[tuple[Any, bool], frozenset[int]] = {}

    def prompt(self, messages: Sequence[Message]) -> Rendered:
        """Return the text to generate the next turn from, and the earlier turns in it. Raises `ChatTemplateError`."""
        tools = tools_of(messages)
        self._check_tools(tools)
        dicts = [self._template.spelled(message) for message in messages]
        text = self._template.render(dicts, tools, True)
        self._check_context(messages, dicts, tools, text)
        answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
        history = History(self._template, dicts, tools, answers)
        return self._with_places(Rendered(text, ()), [self._place(history, messages, index) for index in answers])

    def __call__(self, conversation: Sequence[Message]) -> list[Rendered]:
        """Return texts that hold each trained turn once, that of the whole conversation last.

        Raises `ChatTemplateError`.
        """
        tools = tools_of(conversation)
        self._check_tools(tools)
        messages = self._thoughts_dropped(conversation)
        answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
        if not answers:
            raise ChatTemplateError("the conversation has no answer to train")
        wanted = answers[-1:] if self._rules.last_turn_only else answers
        wanted = [index for index in wanted if messages[index].weight > 0] or answers[-1:]
        messages = messages[: wanted[-1] + 1]
        dicts = [self._template.spelled(message) for message in messages]
        history = History(self._template, dicts, tools, answers)
        turns = {index: self._turn(history, messages, index) for index in wanted}
        texts = _share_texts(list(turns.values()))
        last_of = {turn.text: index for index, turn in turns.items()}
        for place, text in enumerate(texts, start=1):
            index = last_of[text.text]
            exact = place == len(texts) or len(texts) <= EXACT_TURNS
            self._check_context(messages[:index], dicts[:index], tools, text.text, exact)
        prompts = [
            turn.text[: turn.spans[0].start] if (turn := turns.get(index)) else self._place(history, messages, index)
            for index in answers
            if index < len(messages)
        ]
        return [self._with_places(text, prompts) for text in texts]

    def _with_places(self, text: Rendered, prompts: Sequence[str | None]) -> Rendered:
        """Return the text with a span at each prompt in it, of nothing trained where an answer is context only.

        Tokens of a prompt end where it does, in whatever text it stands: generation starts there.
        """
        there = {span.start: span for span in text.spans}
        for prompt in prompts:
            if prompt is not None and len(prompt) not in there and text.text.startswith(prompt):
                there[len(prompt)] = Span(len(prompt), ((len(prompt), TokenKind.none),))
        return Rendered(text.text, tuple(there[start] for start in sorted(there)))

    def _check_tools(self, tools: Any) -> None:
        if tools and not self._template.takes_tools:
            raise ChatTemplateError(
                "the chat template does not write the tools of a conversation; data.ignore_columns=[tools] leaves them "
                "out"
            )

    def _check_context(
        self,
        messages: Sequence[Message],
        dicts: Sequence[dict[str, Any]],
        tools: Any,
        prompt: str,
        exact: bool = True,
    ) -> None:
        """Raise for a message that the prompt lacks; `exact` looks beyond text that stands elsewhere, by rendering."""
        dropped = self._dropped(messages, dicts, tools) if exact else ()
        for index, message in enumerate(messages):
            parts = _SWITCHES.split(message.content) if message.role == "system" else [message.content]
            is_changed = message.role in ("system", "user") and any(part.strip() not in prompt for part in parts)
            if index in dropped or is_changed:
                raise ChatTemplateError(
                    f"the chat template does not write the content of message {index + 1}, which is of "
                    f"{'a' if message.role == 'tool' else 'the'} {message.role}"
                )

    def _dropped(self, messages: Sequence[Message], dicts: Sequence[dict[str, Any]], tools: Any) -> frozenset[int]:
        """Return which turns before an answer the template leaves out, found once for all that take the same turns.

        Each turn says what no other says, as the text of one that is left out may stand elsewhere in the prompt.
        """
        others = [index for index, message in enumerate(messages) if message.role != "assistant"]
        turns = tuple((one.role, bool(one.tool_calls), one.reasoning is None, one.name is None) for one in messages)
        if (turns, bool(tools)) not in self._dropped_of:
            said = {index: f"qzm{index}z" for index in others}
            named = [{**turn, "content": said[i]} if i in said else turn for i, turn in enumerate(dicts)]
            if len(self._dropped_of) >= _MOST_SHAPES:
                self._dropped_of.clear()
            try:
                text = self._template.render(named, tools, True)
            except ChatTemplateError:  # a result that has to be JSON is one reason
                text = " ".join(said.values())
            self._dropped_of[turns, bool(tools)] = frozenset(i for i in others if said[i] not in text)
        return self._dropped_of[turns, bool(tools)]

    def _thoughts_dropped(self, conversation: Sequence[Message]) -> list[Message]:
        rule, messages = self._rules.reasoning, list(conversation)
        if rule is Reasoning.keep:
            return messages
        answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
        for index in answers[:-1] if rule is Reasoning.last else answers:
            message = messages[index]
            thought, content = self._template.thought_of(message)
            if thought is None and OPENING.match(content):
                _log_open_thought(rule.value)
            if (answer := without_thoughts(content)) != content:
                _log_thoughts_inside(rule.value)
            thought, content = "" if thought is None and answer != content else thought, answer
            if not content.strip() and not message.tool_calls:
                raise ChatTemplateError(
                    f"data.reasoning={rule.value}: assistant message {index + 1} is a thought alone, which leaves "
                    "nothing of it"
                )
            messages[index] = message if thought is None else replace(message, content=content, reasoning=None)
        return messages

    def _place(self, history: "History", messages: Sequence[Message], index: int) -> str | None:
        """Return the prompt before a turn that is context; None where the template refuses one, as at the beginning."""
        try:
            return self._prompt(history, messages[index], index, history.around(index)[0])
        except ChatTemplateError:
            return None

    def _prompt(self, history: "History", message: Message, index: int, usual: str) -> str:
        """Return the prompt that a turn is generated from: the usual one, or the one that asks for its thought."""
        if _CLOSED_THOUGHT.search(usual) and self._template.thought_of(message)[0]:
            _log_thinking()
            return history.thinking_prompt(index)
        return usual

    def _turn(self, history: "History", messages: Sequence[Message], index: int) -> Rendered:
        usual, whole, places = history.around(index)
        message = messages[index]
        prompt = self._prompt(history, message, index, usual)
        if whole.startswith(prompt):
            said = whole[len(prompt) :]
        else:
            said = self._rewritten(message, index, prompt, whole, *places())
        parts, said = self._parts(message, index, said)
        start = len(prompt)
        return Rendered(
            prompt + said, (Span(start, tuple((start + stop, kind) for stop, kind in parts), message.weight),)
        )

    def _rewritten(
        self, message: Message, index: int, prompt: str, whole: str, end: int | None, place: int | None
    ) -> str:
        """Return what the assistant says where the rendering with the answer does not begin with the prompt.

        `end` is where the generation prompt begins in `prompt`, `place` where the turn does in `whole`.
        """
        if end is None or place is None:
            raise ChatTemplateError(
                f"the chat template is not prefix-stable: the prompt before assistant message {index + 1} ends "
                f"{prompt[-40:]!r} in generation and is not in the rendering of the conversation"
            )
        header, turn = prompt[end:], whole[place:]
        if turn.startswith(header):
            return turn[len(header) :]
        opened = OPENED.search(header)
        if opened is None or not turn.startswith(header[: opened.start()]):
            raise ChatTemplateError(
                f"the chat template is not prefix-stable: the prompt before assistant message {index + 1} ends "
                f"{header[-40:]!r} in generation and {turn[:40]!r} in training"
            )
        thought, content = self._template.thought_of(message)
        text, between = turn[opened.start() :], self._template.thought_end
        closing = CLOSING.search(text) if OPENING.match(text) is not None else None
        answer = text if closing is None else text.partition(closing[0].strip())[2]
        space = between[len(between.rstrip()) :]
        if answer.startswith(space) and not content.startswith(space):
            between = between.rstrip()  # the template has put it there already
        return (thought or "").strip() + between + answer

    def _parts(self, message: Message, index: int, said: str) -> tuple[list[tuple[int, TokenKind]], str]:
        """Return the parts of what is said in a turn, each with where it stops, and the text with the turn's end."""
        stop, end = self._end(said)
        if end == stop:
            follows = self._follows(bool(message.tool_calls))
            if follows:
                stop, said = len(said), said + follows
                end = len(said)
            else:
                stop = end = len(said)
        given, answer = self._template.thought_of(message)
        thought, answer = (given or "").strip(), answer.strip()
        calls = bool(message.tool_calls)
        thought_stop = self._thought_stop(thought, index, said)
        answer_start = _place_of(answer, said, thought_stop, stop, end, calls) if answer else thought_stop
        if answer_start < 0:
            raise ChatTemplateError(
                f"the chat template does not write the content of assistant message {index + 1} as it is"
            )
        after = answer_start + len(answer)
        if after >= end and (later := self._end(said, after))[0] < len(said):  # the token found is the answer's own
            stop, end = later
        stop = max(stop, after)  # an answer may itself end in a special token
        if given is not None and not (thought or answer or calls):
            raise ChatTemplateError(f"assistant message {index + 1} says nothing, its thought is empty")
        parts: list[tuple[int, TokenKind]] = []
        first_call = calls and _names_call(message, said[min(thought_stop, answer_start) : answer_start])
        if first_call:
            parts += [(thought_stop, TokenKind.reasoning)] * (thought_stop > 0) + [(answer_start, TokenKind.tool_call)]
        elif thought or CLOSING.search(said[:answer_start]):
            parts.append((answer_start if answer or calls else stop, TokenKind.reasoning))
        if answer:
            parts.append((answer_start + len(answer) if calls else stop, TokenKind.answer))
        if calls:
            parts.append((stop, TokenKind.tool_call))
        if end > stop:
            parts.append((end, TokenKind.end))
        return [part for part, before in zip(parts, [(0, None), *parts], strict=False) if part[0] > before[0]], said

    def _thought_stop(self, thought: str, index: int, said: str) -> int:
        """Return where the thought of a turn stops with the mark that closes it; 0 where no thought is said."""
        if not thought:
            empty = EMPTY_THOUGHT.match(said)
            return empty.end() if empty is not None else 0
        begin = self._template.thought_begin.strip()
        if begin and said.lstrip().startswith(begin):
            start = said.index(begin) + len(begin)
        else:
            start = opening.end() if (opening := OPENING.match(said)) is not None else 0
        if (place := said.find(thought, start)) < 0:
            raise ChatTemplateError(
                f"the chat template does not write the thought of assistant message {index + 1}; data.reasoning=drop "
                "leaves it out"
            )
        closing = CLOSING.match(said, place + len(thought))
        return closing.end() if closing is not None else place + len(thought)

    def _end(self, said: str, after: int = 0) -> tuple[int, int]:
        """Return where the end tokens of a turn start and stop; the end of the text twice where it has none."""
        found = (tokens.find(said, after) for tokens in self._ends)
        return next(filter(None, found), (len(said), len(said)))

    def _follows(self, calls: bool) -> str:
        """Return the token with which the next turn begins, where it is what ends this one."""
        if calls not in self._next_role:
            match = self._begins.match(self._template.next_role(calls)) if self._begins else None
            self._next_role[calls] = match[0] if match else ""
        return self._next_role[calls]


_MOST_SHAPES = 4096
"""Number of shapes of conversations for which the template's writing is kept."""
_SWITCHES = re.compile(r"/(?:no_)?think\b|/system_override\b")
"""Words of a system message that some templates take out: they say how the prompt is written."""
_CLOSED_THOUGHT = re.compile(r"<think>\s*</think>\s*\Z")


@lru_cache
def _log_thinking() -> None:
    log.warning(
        "The chat template's usual prompt asks for no thought: turns with one are trained after the prompt of "
        "enable_thinking=true; data.template_options={enable_thinking:true} generates with it too."
    )


@lru_cache
def _log_open_thought(rule: str) -> None:
    log.warning("data.reasoning=%s: an answer that opens a thought and does not close it stays as it is", rule)


@lru_cache
def _log_thoughts_inside(rule: str) -> None:
    log.warning("data.reasoning=%s: thoughts in the middle of answers are left out too", rule)


def _place_of(answer: str, said: str, thought_stop: int, stop: int, end: int, calls: bool) -> int:
    """Return where the answer begins in what is said, -1 where it does not stand there unchanged.

    Without calls the answer ends where the turn's end tokens start, or in some that are its own; with calls it
    follows the thought at once, if it does not follow the calls.
    """
    if calls:
        return thought_stop if said.startswith(answer, thought_stop) else said.find(answer, thought_stop, end)
    last = said[:stop].rstrip()
    if last.endswith(answer):
        return len(last) - len(answer)
    place = said.find(answer, thought_stop, end)
    return place if place >= 0 else said.find(answer, 0, end)  # an answer may begin with the mark that closes a thought


def _names_call(message: Message, text: str) -> bool:
    return any(call["function"]["name"] in text for call in message.tool_calls)


def _begins_pattern(tokens: Sequence[str]) -> re.Pattern[str] | None:
    either = "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True) if token)
    return re.compile(either) if either else None


def _share_texts(turns: Sequence[Rendered]) -> list[Rendered]:
    """Return fewer texts: a turn that another text holds in the same form, after the same prompt, is trained there."""
    left = list(turns)
    texts: list[Rendered] = []
    while left:
        base = left.pop()
        held = [turn for turn in left if base.text.startswith(turn.text[: turn.spans[0].stop])]
        spans = [*base.spans, *(turn.spans[0] for turn in held)]
        texts.append(Rendered(base.text, tuple(sorted(spans, key=lambda span: span.start))))
        left = [turn for turn in left if not base.text.startswith(turn.text[: turn.spans[0].stop])]
    return texts[::-1]
