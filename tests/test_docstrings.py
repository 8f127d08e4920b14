"""Docstrings are sentences or noun phrases: none begins with a clause that lacks its noun or its verb."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_peft

PACKAGE = Path(lightning_peft.__file__).parent
ROOT = Path(__file__).parents[1]
HEADLESS = re.compile(r"(Of|Those|As|What|Whether|Which|How|Where|Who|Why)\b")
"""Beginnings of a docstring that leave out what it is about, such as "Whether the run is over."."""
HEADLESS_LATER = re.compile(r"[.:;]\s+(Of|Those|What|Whether|Which|How)\b")
"""Beginnings of a later sentence; As, Where and Who may begin one whose main clause follows."""


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of each docstring: of modules, classes and functions, and below options and constants."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value.strip()


def is_headless(text: str) -> bool:
    return HEADLESS.match(text) is not None or HEADLESS_LATER.search(text) is not None


def ruff(*words: str, source: str | None = None) -> str:
    """Return what ruff finds by the project's settings."""
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=concise", *words]
    return subprocess.run(command, cwd=ROOT, input=source, capture_output=True, text=True, timeout=60).stdout


def test_no_docstring_begins_without_its_noun() -> None:
    found = [
        (path.relative_to(PACKAGE), line, text)
        for path in PACKAGE.rglob("*.py")
        for line, text in docstrings(path.read_text(encoding="utf-8"))
    ]
    assert len(found) > 3000
    assert not [f"{path}:{line}: {text[:80]}" for path, line, text in found if is_headless(text)]


@pytest.mark.parametrize("text", ["Whether the run is over.", "The trials. Of a pruned sweep those that go on."])
def test_a_clause_without_its_noun_is_seen(text: str) -> None:
    (found,) = docstrings(f'OVER = True\n"""{text}"""\n')
    assert found == (2, text)
    assert is_headless(text)


def test_ruff_holds_functions_to_the_imperative() -> None:
    source = 'def logits() -> None:\n    """The logits of all tokens."""\n'
    assert "D401" in ruff("--stdin-filename=lightning_peft/logits.py", "-", source=source)
    assert ruff("--select=D401", "lightning_peft", "benchmarks", "tests").startswith("All checks passed")
