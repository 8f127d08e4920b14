"""Marks in a chat template by which each message is found again in what it renders."""

import re
from dataclasses import dataclass
from typing import Any

from jinja2 import nodes

MARK = "mark_message_"
# These enclose the number of a message in a marked rendering: private use, from another plane than icons are.
OPEN, CLOSE = "\U0010fff0", "\U0010fff1"
MARKS = re.compile(f"{OPEN}(end|[0-9]+){CLOSE}")


@dataclass(frozen=True)
class Marked:
    """A rendered conversation with the place of each message."""

    text: str
    starts: dict[int, int]
    """First character of each message."""
    end: int
    """First character after the last message: what follows is the generation prompt."""


def mark_loops(tree: nodes.Template) -> bool:
    """Put marks into the outermost loops of a template; return whether there are any."""
    found = False

    def visit(body: list[Any]) -> None:
        nonlocal found
        for place in range(len(body) - 1, -1, -1):
            node = body[place]
            if isinstance(node, nodes.For) and isinstance(node.target, nodes.Name):
                mark = nodes.Call(nodes.Name(MARK, "load"), [nodes.Name(node.target.name, "load")], [], None, None)
                node.body.insert(0, nodes.Output([mark]).set_lineno(node.lineno))
                end = nodes.Output([nodes.TemplateData(f"{OPEN}end{CLOSE}")]).set_lineno(node.lineno)
                body.insert(place + 1, end)
                found = True
            elif isinstance(node, nodes.If):
                for branch in (node.body, node.else_):
                    visit(branch)
                visit(node.elif_)
            elif isinstance(node, nodes.Scope | nodes.ScopedEvalContextModifier):
                visit(node.body)

    visit(tree.body)
    if tree.environment is not None:
        tree.set_environment(tree.environment)
    return found


def without_marks(text: str, plain: str) -> Marked | None:
    """Take the marked text apart; return None unless the marks stand in the order of the messages."""
    starts: dict[int, int] = {}
    removed = end = 0
    for match in MARKS.finditer(text):
        place = match.start() - removed
        removed += len(match[0])
        if match[1] == "end":
            end = place
        else:
            starts[int(match[1])] = place  # a loop that only looks comes before the one that writes
    places = [starts[index] for index in sorted(starts)]
    return Marked(plain, starts, end) if places and places == sorted(places) and places[-1] <= end else None
