"""Thoughts inside the text of an answer, and the keys by which templates read them."""

import re

INLINE_THOUGHT = re.compile(
    r"\s*(?:<think>|<\|channel>thought\n|\[THINK\])?(?P<thought>.*?)(?:</think>|<channel\|>|\[/THINK\])\s*", re.DOTALL
)
"""A thought at the beginning of an answer, as models write it; its opening may have been in the prompt."""


def reasoning_keys(thought: str) -> dict[str, str]:
    """The thought of a message under the names that templates read."""
    return {"thinking": thought, "reasoning_content": thought}


def split_thought(content: str) -> tuple[str | None, str]:
    """The thought at the beginning of an answer, None where there is none, and the rest."""
    match = INLINE_THOUGHT.match(content) if ">" in content or "]" in content else None
    if match is None:
        return None, content
    return match["thought"].strip(), content[match.end() :]
