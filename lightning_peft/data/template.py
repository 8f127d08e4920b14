"""A chat template: its rendering, the place of each message in the text, and its spelling of thoughts and calls.

A trial on a short conversation shows what a template takes, not the name of a model family.
"""

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import _compile_jinja_template

from lightning_peft.data.conversation import Message
from lightning_peft.data.marks import CLOSE, MARK, MARKS, OPEN, Marked, mark_loops, without_marks
from lightning_peft.data.text_calls import writer_of
from lightning_peft.data.thoughts import CLOSING, OPENED, reasoning_keys, split_thought

log = logging.getLogger(__name__)

_RENDER_ERRORS = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)
"""The errors that a template, which is a program, raises on a conversation it was not written for."""

_OWN_THOUGHT = re.compile(r"""reasoning_content|\.\s*reasoning\b|["']reasoning["']|<\|channel>|\[THINK\]""")
"""The words in the source of a template that reads thoughts from a key, or spells them its own way."""

_ASKED, _ANSWERED, _THOUGHT, _NAME = "Qzx asks", "Qzy answers", "Qzw thinks", "qznname01"
# Mistral's templates take calls with ids of nine letters or digits alone.
_CALL = {"id": "qzi000001", "type": "function", "function": {"name": "qzv_call", "arguments": {"qzu": "qzt"}}}
_OTHER_CALL = {"id": "qzi000002", "type": "function", "function": {"name": "qzp_other", "arguments": {"qzu": "qzq"}}}
_TOOL = {
    "type": "function",
    "function": {
        "name": "qzv_call",
        "description": "Qzs describes",
        "parameters": {"type": "object", "properties": {"qzu": {"type": "string", "description": "Qzr"}}},
    },
}


class ChatTemplateError(ValueError):
    """A chat template from which trained and untrained parts cannot be told, or that refuses a conversation."""


@dataclass(frozen=True)
class CallSpelling:
    """The way a template takes a turn that calls tools."""

    arguments_as_text: bool
    empty_content: dict[str, Any]
    """The content key of a turn with calls and no text."""


class ChatTemplate:
    """A chat template with the special tokens it may write. Use `tokenizer_template.template_of` to get one."""

    def __init__(self, source: str, special_tokens: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        """Compile the template; `options` are variables that it reads, such as enable_thinking.

        Raises ChatTemplateError where the text is no template, ValueError for an option that it does not name.
        """
        self.source = source
        for name in options:
            if not re.search(rf"\b{re.escape(str(name))}\b", source):
                raise ValueError(f"data.template_options: the chat template reads no option {name!r}")
        self._variables = {**special_tokens, **options}
        self._tool_variables = [name for name in ("tools", "xml_tools") if name == "tools" or name in source]
        self._written: dict[tuple[str, str], bool] = {}
        try:
            self._compiled = _compile_jinja_template(source)
        except TemplateError as error:
            raise ChatTemplateError(f"the chat template is no Jinja template: {error}") from error

    def render(
        self, messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]] | None, add_generation_prompt: bool
    ) -> str:
        """Return the conversation as text. Raises `ChatTemplateError` for one that the template refuses."""
        return self._render(self._compiled, messages, tools, add_generation_prompt)

    def thinking_prompt(self, messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
        """Return the prompt that asks for a thought, of a template whose usual one asks for none."""
        return self._render(self._compiled, messages, tools, True, enable_thinking=True)

    def _render(self, compiled: Any, messages: Sequence[Any], tools: Any, generation: bool, **more: Any) -> str:
        try:
            return compiled.render(
                **(self._variables | more),
                messages=list(messages),
                **dict.fromkeys(self._tool_variables, tools),
                documents=None,
                add_generation_prompt=generation,
            )
        except _RENDER_ERRORS as error:
            roles = ", ".join(message["role"] for message in messages)
            hint = _refused_roles(messages)
            raise ChatTemplateError(f"the chat template refuses a conversation of {roles}: {error}{hint}") from error

    def marked(
        self, messages: Sequence[dict[str, Any]], tools: Any, add_generation_prompt: bool, checked: bool = False
    ) -> Marked | None:
        """Return the rendering with the place of each message; None where the template's messages are not told apart.

        checked: the template was seen to render these messages alike with and without marks.
        """
        if self._marking is None:
            return None
        number = {id(message): index for index, message in enumerate(messages)}

        def mark(message: Any) -> str:
            return f"{OPEN}{number[id(message)]}{CLOSE}" if id(message) in number else ""

        try:
            text = self._render(self._marking, messages, tools, add_generation_prompt, **{MARK: mark})
        except ChatTemplateError:
            return None
        plain = MARKS.sub("", text)
        if not checked and plain != self.render(messages, tools, add_generation_prompt):
            return None
        return without_marks(text, plain)

    @cached_property
    def _marking(self) -> Any:
        """Return the template with a mark where each round of its loops over messages begins, and where they end."""
        environment = self._compiled.environment
        try:
            tree = environment.parse(self.source)
            if not mark_loops(tree):
                return None
            return environment.from_string(tree)
        except TemplateError:
            return None

    def _try(self, messages: list[dict[str, Any]], tools: Any = None, generation: bool = False) -> str:
        try:
            return self.render(messages, tools, generation)
        except ChatTemplateError:
            return ""

    @cached_property
    def takes_tools(self) -> bool:
        """Return whether the template writes the tools of a conversation."""
        return "qzv_call" in self._try([{"role": "user", "content": _ASKED}], [_TOOL], True)

    @cached_property
    def takes_reasoning(self) -> bool:
        """Return whether the template writes a thought that stands beside the content of an answer."""
        answer = {"role": "assistant", "content": _ANSWERED, **reasoning_keys(_THOUGHT)}
        return _THOUGHT in self._try([{"role": "user", "content": _ASKED}, answer])

    @cached_property
    def takes_reasoning_with_calls(self) -> bool:
        """Return whether the template writes a thought that stands beside calls of tools."""
        if self.call_spelling is None:
            return False
        turn = {"role": "assistant", **self.call_spelling.empty_content, "tool_calls": [self._spelled_call(_CALL)]}
        return _THOUGHT in self._try([{"role": "user", "content": _ASKED}, turn | reasoning_keys(_THOUGHT)])

    @cached_property
    def takes_several_calls(self) -> bool:
        """Return whether the template writes all calls of a turn, or refuses several itself."""
        if self.call_spelling is None:
            return self.calls_as_text is not None
        calls = [self._spelled_call(call) for call in (_CALL, _OTHER_CALL)]
        turn = {"role": "assistant", **self.call_spelling.empty_content, "tool_calls": calls}
        text = self._try([{"role": "user", "content": _ASKED}, turn])
        return not text or ("qzv_call" in text and "qzp_other" in text)

    def writes(self, role: str, key: str) -> bool:
        """Return whether the template writes a key of turns of this role, beside their content."""
        if (role, key) not in self._written:
            question, turn = {"role": "user", "content": _ASKED}, {"role": role, "content": _ANSWERED}
            before: list[dict[str, Any]] = [question] if role in ("assistant", "tool") else []
            if role == "tool" and self.call_spelling is not None:
                call = self._spelled_call(_CALL)
                before.append({"role": "assistant", **self.call_spelling.empty_content, "tool_calls": [call]})
                turn["tool_call_id"] = call["id"]
            turn[key] = _NAME
            text = self._try([*before, turn] if role != "system" else [turn, question])
            self._written[role, key] = _NAME in text
        return self._written[role, key]

    @cached_property
    def _names_reasoning(self) -> bool:
        """Return whether thoughts have a place of their own, so that `<think>` in content is something else."""
        return _OWN_THOUGHT.search(self.source) is not None or self.takes_reasoning or self.takes_reasoning_with_calls

    @cached_property
    def call_spelling(self) -> CallSpelling | None:
        """Return the way calls of tools are handed to the template; None where it does not write them."""
        function = _CALL["function"]
        assert isinstance(function, dict)
        as_text = {**_CALL, "function": {**function, "arguments": json.dumps(function["arguments"])}}
        for arguments_as_text, call in ((False, _CALL), (True, as_text)):
            for empty in ({"content": ""}, {}, {"content": None}):
                turn = {"role": "assistant", **empty, "tool_calls": [call]}
                text = self._try([{"role": "user", "content": _ASKED}, turn])
                if "qzv_call" in text and "qzt" in text and "None" not in text:
                    return CallSpelling(arguments_as_text, empty)
        return None

    @cached_property
    def calls_as_text(self) -> Callable[[str, Sequence[Mapping[str, Any]]], str] | None:
        """Return what makes the content of a turn that calls tools, where the template has no other place for calls."""
        return writer_of(self._try([{"role": "user", "content": _ASKED}], [_TOOL], True))

    @cached_property
    def opens_thought(self) -> str | None:
        """Return the mark with which the generation prompt opens a thought; None where it does not."""
        opened = OPENED.search(self._try([{"role": "user", "content": _ASKED}], generation=True))
        return None if opened is None else opened["mark"]

    def thought_of(self, message: Message) -> tuple[str | None, str]:
        """Return a turn's thought, from its key or the beginning of its content, else None; and the answer."""
        if message.reasoning is not None:
            return message.reasoning, message.content
        return split_thought(message.content, self.opens_thought)

    @cached_property
    def _splits_content(self) -> bool:
        """Return whether the template looks for a thought in an answer's content, unless a key says it has none."""
        said = f"{_THOUGHT} </think> {_ANSWERED}"
        texts = [
            self._try([{"role": "user", "content": _ASKED}, {"role": "assistant", "content": said, **keys}])
            for keys in ({}, reasoning_keys(""))
        ]
        return [said in text for text in texts] == [False, True]

    @cached_property
    def thought_begin(self) -> str:
        """Return the text before an answer's thought; empty where there is none, or where it is in the prompt."""
        question = [{"role": "user", "content": _ASKED}]
        prompt, answer = self._try(question, generation=True), {"role": "assistant", "content": _ANSWERED}
        text = self._try([*question, answer | reasoning_keys(_THOUGHT)])
        said = text.removeprefix(prompt)
        return said[: said.index(_THOUGHT)] if said != text and _THOUGHT in said else ""

    @cached_property
    def thought_end(self) -> str:
        """Return the text between a thought and its answer; the common spelling where the template writes none."""
        question = [{"role": "user", "content": _ASKED}]
        for answer in (
            {"role": "assistant", "content": _ANSWERED, **reasoning_keys(_THOUGHT)},
            {"role": "assistant", "content": f"<think>\n{_THOUGHT}\n</think>\n\n{_ANSWERED}"},
        ):
            text = self._try([*question, answer])
            if _THOUGHT in text and _ANSWERED in text:
                return text[text.index(_THOUGHT) + len(_THOUGHT) : text.rindex(_ANSWERED)]
        return "\n</think>\n\n"

    def check(self) -> None:
        """Raise ChatTemplateError where the template does not write an answer, once, or refuses a plain question."""
        question = [{"role": "user", "content": _ASKED}]
        text = self.render([*question, {"role": "assistant", "content": _ANSWERED}], None, False)
        if (count := text.count(_ANSWERED)) != 1:
            raise ChatTemplateError(
                f"the chat template writes the content of assistant message 2 {count} times, it must do so once"
            )

    def next_role(self, calls: bool) -> str:
        """Return the beginning of a turn right after an answer, or calls; "" if the template refuses such a turn."""
        spelling = self.call_spelling
        turn: dict[str, Any] = {"role": "assistant", "content": _ANSWERED}
        if calls and spelling is not None:
            turn = {"role": "assistant", **spelling.empty_content, "tool_calls": [self._spelled_call(_CALL)]}
        before = [{"role": "user", "content": _ASKED}, turn]
        after = {"role": "tool", "tool_call_id": _CALL["id"]} if calls else {"role": "user"}
        after |= {"content": _ASKED}
        text, longer = self._try(before), self._try([*before, after])
        return longer[len(text) :] if text and longer.startswith(text) else ""

    def _spelled_call(self, call: Mapping[str, Any]) -> Mapping[str, Any]:
        if self.call_spelling is None or not self.call_spelling.arguments_as_text:
            return call
        function = call["function"]
        return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    def spelled(self, message: Message) -> dict[str, Any]:
        """Return a message as the template takes it. Raises `ChatTemplateError` for what the template cannot write."""
        named = {"name": message.name, "tool_call_id": message.tool_call_id}
        keys: dict[str, Any] = {key: value for key, value in named.items() if value is not None}
        if message.role != "assistant":
            return {"role": message.role, "content": message.content, **keys}
        thought, content = message.reasoning, message.content
        if self._names_reasoning:
            thought, content = self.thought_of(message)
        spelling, calls = self.call_spelling, message.tool_calls
        if calls and spelling is None and self.calls_as_text is not None:
            _log_calls_as_text()
            content, calls = self.calls_as_text(content, calls), ()
        if thought and self._names_reasoning:
            if not (self.takes_reasoning_with_calls if calls else self.takes_reasoning):
                turn_is = "that calls tools" if calls else "without calls of tools"
                raise ChatTemplateError(
                    f"the chat template does not write the thought of a turn {turn_is}; data.reasoning=drop leaves it "
                    "out"
                )
            keys |= reasoning_keys(thought)
        elif self._splits_content and CLOSING.search(content):
            keys |= reasoning_keys("")  # else text before the mark would be taken for a thought
        elif thought:
            content = f"<think>\n{thought.strip()}\n</think>\n\n{content}"
        if not calls:
            return {"role": "assistant", "content": content, **keys}
        if spelling is None:
            raise ChatTemplateError("the chat template does not write tool calls")
        if len(calls) > 1 and not self.takes_several_calls:
            raise ChatTemplateError(f"the chat template writes one call of a turn, and a turn has {len(calls)} of them")
        given = {"content": content} if content.strip() else spelling.empty_content
        return {
            "role": "assistant",
            **given,
            "tool_calls": [self._spelled_call(call) for call in calls],
            **keys,
        }


@lru_cache
def _log_calls_as_text() -> None:
    log.info("The chat template has no place for calls of tools: they are the text of their turn, as its prompt asks.")


def _refused_roles(messages: Sequence[dict[str, Any]]) -> str:
    if any(message["role"] == "system" for message in messages):
        return "; without a system message it may take it"
    return ""
