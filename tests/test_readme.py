"""The README's commands compose and its Python runs."""

import re
import shlex
from pathlib import Path

import pytest

from lightning_peft.__main__ import COMMANDS
from lightning_peft.adapters.registry import METHODS
from lightning_peft.compose import compose_config
from lightning_peft.config import CONF_DIR

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = dict.fromkeys(("bash", "python"), "")
for language, code in re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL):
    BLOCKS[language] = BLOCKS.get(language, "") + code
COMMAND_LINES = [line for line in BLOCKS["bash"].splitlines() if line.startswith("lightning-peft ")]


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_command_composes(line):
    _, command, *words = shlex.split(line, comments=True)
    assert command in COMMANDS
    # A sweep's list is for Hydra's sweeper; each of its values has to compose.
    single = [re.sub(r"^([\w.]+=[^\[,]*),.*$", r"\1", word) if "-m" in words else word for word in words]
    compose_config(command, [word for word in single if word != "-m"])


def test_make_targets_exist():
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", BLOCKS["bash"], re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS["python"], "README.md", "exec"), {})
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    "group", ["model", "method", "target_modules", "hardware", "data", "quantization", "optimizer"]
)
def test_group_table_lists_every_option(group):
    (row,) = [line for line in README.splitlines() if line.startswith(f"| `{group}` |")]
    for path in (CONF_DIR / group).glob("*.yaml"):
        assert re.search(rf"\b{path.stem}\b", row), f"{group}={path.stem} is not in the README"


@pytest.mark.parametrize("name", METHODS)
def test_method_table_says_what_the_row_says(name):
    row = METHODS[name]
    cells = f"`{name}`", row.change, row.paper, row.count
    assert f"| {' | '.join(cells)} |".replace("|  |", "| |") in README
