"""A name says one thing: no type of the package is called as another is, and few modules are."""

import ast
import re
from collections import defaultdict
from pathlib import Path

import lightning_peft

PACKAGE = Path(lightning_peft.__file__).parent
SAME_NOUN = {
    "__init__": "a package",
    "config": "the options of its folder",
    "registry": "the table of what its folder offers",
    "generate": "the command, and what it does to a model",
    "merge": "the command, and what it does to an adapter",
    "sweep": "the command, the sweep on disk that it looks at, and the page of it",
    "segments": "layers of several models, and the sum that they compute",
    "shared_input": "layers that read one input, and the sum that they compute",
    "teacher": "the model that a distillation learns from, and what it takes of memory",
    "together": "runs that train together: what plans them, trains them and says what they take of memory",
    "preemption": "signals that end a run, and the callback that heeds them at a step's end",
}
"""Modules that several folders have, and the one thing that the name means in all of them."""


def type_names(source: str) -> set[str]:
    """Return the names of classes and of aliases of types; a TypeVar stands for no type of its own."""
    tree = ast.parse(source)
    aliases = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign) and not isinstance(node.value, ast.Call)
        for target in node.targets
        if isinstance(target, ast.Name) and re.match("[A-Z][a-z]", target.id)
    }
    return aliases | {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def in_several(names: dict[str, set[str]]) -> dict[str, list[str]]:
    """Return the names that several files have -> those files, from file -> its names."""
    found = defaultdict(list)
    for path, own in sorted(names.items()):
        for name in own:
            found[name].append(path)
    return {name: paths for name, paths in found.items() if len(paths) > 1}


def names_of_files() -> dict[str, Path]:
    return {str(path.relative_to(PACKAGE)): path for path in PACKAGE.rglob("*.py")}


def test_no_two_types_have_one_name():
    assert in_several({name: type_names(path.read_text()) for name, path in names_of_files().items()}) == {}


def test_modules_of_one_name_mean_the_same():
    assert set(in_several({name: {path.stem} for name, path in names_of_files().items()})) == set(SAME_NOUN)


def test_classes_and_aliases_are_types_and_type_variables_are_none():
    source = 'Row = dict[str, int]\nT = Rate = TypeVar("T")\nLIMIT = 3\nclass Group:\n    class Inner: ...'
    assert type_names(source) == {"Row", "Group", "Inner"}


def test_a_name_in_two_files_is_found():
    assert in_several({"a": {"Row", "Group"}, "b": {"Row"}}) == {"Row": ["a", "b"]}
