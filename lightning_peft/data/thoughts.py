"""Thoughts inside the text of an answer, and the keys by which templates read them."""

import re

MARKS = {"<think>": "</think>", "<|channel>thought\n": "<channel|>", "[THINK]": "[/THINK]"}
"""Marks that open a thought, as models write it, each with the mark that closes it."""
_OPENS, _CLOSES = ("|".join(map(re.escape, marks)) for marks in (MARKS, MARKS.values()))
_ANY = re.compile(f"{_OPENS}|{_CLOSES}")
_CODE = "```"
_IN_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
_CLOSED = re.compile("|".join(f"{re.escape(begin)}.*?{re.escape(end)}" for begin, end in MARKS.items()), re.DOTALL)

OPENING = re.compile(rf"\s*(?:{_OPENS})")
"""The beginning of a text that starts with a thought."""
OPENED = re.compile(rf"(?P<mark>{_OPENS})\s*\Z")
"""The end of a prompt that opens the thought itself."""
CLOSING = re.compile(rf"\s*(?:{_CLOSES})\s*")
"""The text between a thought and its answer."""
EMPTY_THOUGHT = re.compile(rf"\s*(?:{_OPENS})?\s*(?:{_CLOSES})\s*")
"""The beginning of a text that says that nothing was thought; the opening mark may be in the prompt."""


def reasoning_keys(thought: str) -> dict[str, str]:
    """Return the thought of a message under the names that templates read."""
    return {"thinking": thought, "reasoning_content": thought}


def split_thought(content: str, opened: str | None = None) -> tuple[str | None, str]:
    """Return the thought at the beginning of an answer, None where there is none, and the rest.

    opened: the mark with which the prompt opened the thought, if it did. Where the prompt did not, a closing mark
    without an opening one closes a thought only if it stands as DeepSeek-R1 writes it, alone on a line before an empty
    one; anywhere else the answer speaks of it. Text before an opening mark is no thought.
    """
    begin = OPENING.match(content)
    if begin is not None:
        thought, closed, answer = content[begin.end() :].partition(MARKS[begin[0].lstrip()])
        return (thought.strip(), answer.lstrip()) if closed else (None, content)
    mark = _ANY.search(content)
    if mark is None or mark[0] in MARKS:
        return None, content
    before, after = content[: mark.start()], content[mark.end() :]
    if mark[0] == MARKS.get(opened or "") or (_ANY.search(after) is None and _stands_alone(before, after)):
        return before.strip(), after.lstrip()
    return None, content


def without_thoughts(content: str) -> str:
    """Return an answer without the closed thoughts inside it; marks in code are what the answer speaks of."""
    code = [match.span() for match in _IN_CODE.finditer(content)]
    kept, place = "", 0
    for match in _CLOSED.finditer(content):
        if any(start <= match.start() < stop for start, stop in code):
            continue
        before, between = content[place : match.start()], content[match.end() :]
        kept += before if before[-1:].isspace() else before + between[: len(between) - len(between.lstrip())]
        place = match.end() + len(between) - len(between.lstrip())
    return (kept + content[place:]).strip() if place else content


def _stands_alone(before: str, after: str) -> bool:
    is_in_code = before.count(_CODE) % 2 == 1
    return (
        before.endswith("\n") and after.startswith("\n\n") and all(map(str.strip, (before, after))) and not is_in_code
    )
