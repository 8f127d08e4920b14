"""The renderings around each answer of a conversation, at a cost that grows with the number of turns."""

from collections.abc import Callable, Sequence
from typing import Any

from lightning_peft.data.marks import Marked
from lightning_peft.data.template import ChatTemplate

EXACT_TURNS = 8
"""Up to so many assistant turns, each prompt is rendered whole; beyond, with the conversation's beginning and the turns
around it, so that the cost grows with the number of turns and not with its square."""
EXACT_EXCHANGE = 8
"""Messages after a user's up to which all of them are rendered with each turn."""


class History:
    """The renderings around each answer of a conversation: the prompt before it, and the text with it."""

    def __init__(
        self, template: ChatTemplate, messages: list[dict[str, Any]], tools: Any, answers: Sequence[int]
    ) -> None:
        self._template = template
        self._messages = messages
        self._tools = tools
        self._users = [index for index, message in enumerate(messages) if message["role"] == "user"]
        self._whole: Marked | None = None
        self._exchanges: dict[int, tuple[list[int], Marked | None]] = {}
        if len(answers) > EXACT_TURNS and len(self._users) > 0:
            self._whole = template.marked(messages, tools, False)
        self._head = self._beginning(answers)

    def _beginning(self, answers: Sequence[int]) -> list[int]:
        """Return the first exchange, without what happens between its question and its last answer."""
        if not self._users:
            return []
        first = self._users[0]
        after = self._users[1] if len(self._users) > 1 else len(self._messages)
        last = [index for index in answers if first < index < after]
        return [*range(first + 1), *last[-1:]]

    def around(self, index: int) -> tuple[str, str, Callable[[], tuple[int | None, int | None]]]:
        """Return the prompt before answer `index`, the text with it, and a finder of generation prompt and turn."""
        windowed = self._windowed(index)
        if windowed is not None:
            return windowed
        before = self._messages[:index]
        prompt = self._template.render(before, self._tools, True)
        last = index + 1 == len(self._messages)
        whole = self._whole.text if last and self._whole is not None else self._render(range(index + 1), False)

        def places() -> tuple[int | None, int | None]:
            marked_prompt = self._template.marked(before, self._tools, True)
            marked = self._template.marked(self._messages[: index + 1], self._tools, False)
            end = marked_prompt.end if marked_prompt is not None else None
            return end, marked.starts.get(index) if marked is not None else None

        return prompt, whole, places

    def thinking_prompt(self, index: int) -> str:
        return self._template.thinking_prompt(self._messages[:index], self._tools)

    def _render(self, indices: Sequence[int], generation: bool) -> str:
        return self._template.render([self._messages[index] for index in indices], self._tools, generation)

    def _marked(self, indices: Sequence[int], generation: bool) -> Marked | None:
        messages = [self._messages[index] for index in indices]
        return self._template.marked(messages, self._tools, generation, checked=True)  # with the whole conversation

    def _windowed(self, index: int) -> tuple[str, str, Callable[[], tuple[int | None, int | None]]] | None:
        """Do as `around`, from renderings of a part of the conversation; return None where they would differ."""
        if self._whole is None:
            return None
        user = max((place for place in self._users if place < index), default=None)
        if user is None or user not in self._whole.starts:
            return None
        head = self._head if user > self._users[0] else list(range(user))
        start = user + 1
        if index - user > EXACT_EXCHANGE:
            start = next(
                (
                    place
                    for place in range(index - EXACT_EXCHANGE // 2, user, -1)
                    if self._messages[place]["role"] == "assistant"
                ),
                user + 1,
            )
        window = [*head, user, *range(start, index)]
        prompt, whole = self._marked(window, True), self._marked([*window, index], False)
        if prompt is None or whole is None:
            return None
        at_user, number = len(head), len(window)
        if not {at_user, number} <= whole.starts.keys() or at_user not in prompt.starts:
            return None
        before = self._whole.text[: self._whole.starts[user]]
        cut, whole_cut = prompt.starts[at_user], whole.starts[at_user]
        if start > user + 1:
            # The first answer is left out: after a question it may be written otherwise than one after a result is.
            answers = (place for place in range(start + 1, index) if self._messages[place]["role"] == "assistant")
            splice = next(answers, index)
            place = at_user + 1 + splice - start
            between = self._between(head, user, splice, index, prompt, place)
            if between is None or place not in whole.starts:
                return None
            before, cut, whole_cut = before + between, prompt.starts[place], whole.starts[place]
        shift, whole_shift = len(before) - cut, len(before) - whole_cut
        return (
            before + prompt.text[cut:],
            before + whole.text[whole_cut:],
            lambda: (prompt.end + shift, whole.starts[number] + whole_shift),
        )

    def _between(self, head: list[int], user: int, start: int, index: int, prompt: Marked, place: int) -> str | None:
        """Return the text from a question to message `start` of a long exchange; None where `prompt` goes on otherwise.

        `place` is that of the message among those of `prompt`.
        """
        if user not in self._exchanges:
            after = next((other for other in self._users if other > user), len(self._messages))
            self._exchanges[user] = (head, self._marked([*head, *range(user, after)], False))
        _, exchange = self._exchanges[user]
        if exchange is None:
            return None
        offset = len(head) - user
        begin, stop = exchange.starts.get(user + offset), exchange.starts.get(start + offset)
        if begin is None or stop is None:
            return None
        if start >= index:
            return None
        common = [exchange.starts.get(other + offset) for other in range(start, index)]
        here = [prompt.starts.get(place + other - start) for other in range(start, index)]
        if None in common or None in here:
            return None
        shown_there = exchange.text[common[0] : common[-1]]
        shown_here = prompt.text[here[0] : here[-1]]
        return exchange.text[begin:stop] if shown_there == shown_here else None
