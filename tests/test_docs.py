"""README and docs are true: commands compose, Python runs, tables are the code's, named tests and files exist."""

import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from started import run

from docs.generate import index, with_generated
from lightning_peft.__main__ import main
from lightning_peft.adapters.inject import inject_adapters
from lightning_peft.adapters.registry import METHODS
from lightning_peft.checkpoint.peft_format import save_adapter
from lightning_peft.command_line import first_trial
from lightning_peft.commands import COMMANDS
from lightning_peft.commands.plan_sweep import any_draw, plan, split_words, trial_config
from lightning_peft.commands.sweep import sweep
from lightning_peft.compose import compose_config
from lightning_peft.help import command_help
from lightning_peft.models.loading import load_model
from lightning_peft.models.source import ModelConfig
from lightning_peft.schemas import CONF_DIR
from lightning_peft.words import everyday

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
WRITTEN = {
    path.name: path.read_text()
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "AGENTS.md",
        *(page for page in sorted(DOCS.glob("*.md")) if page.name != "index.md"),
    )
}
"""Pages without the site's first one, which is the README."""
GENERATED = re.compile(r"<!-- generated .*?<!-- end -->", re.DOTALL)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", GENERATED.sub("", WRITTEN[page]), re.DOTALL | re.MULTILINE)


SHELL_LINES = [(page, line) for page in WRITTEN for block in blocks(page, "bash") for line in block.splitlines()]
COMMAND_LINES = [(page, line) for page, line in SHELL_LINES if line.startswith("lightning-peft ")]
OTHER_LINES = (
    "#", "make ", "pip install ", "python3 -m venv ", "python docs/generate.py", ".venv/bin/",
    "source <(lightning-peft completion ",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Make a working folder with the files that the pages speak of."""
    for name in ("rows.jsonl", "train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text('{"prompt": "1 + 1", "completion": "2"}\n')
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "1 + 1", "chosen": "2", "rejected": "3"}\n')
    (tmp_path / "labels.jsonl").write_text('{"prompt": "1 + 1", "completion": "2", "label": true}\n')
    (tmp_path / "rows.csv").write_text("question,answer\n1 + 1,2\n")
    (tmp_path / "my.yaml").write_text(blocks("README.md", "yaml")[0])
    (tmp_path / "mixed.yaml").write_text(next(block for block in blocks("your-data.md", "yaml") if "mixed" in block))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("page", "line"), COMMAND_LINES)
def test_command_composes(page, line, folder):
    _, command, *words = shlex.split(line, comments=True)
    if "adapter.init_from=runs/mine" in words:
        model, config = load_model(ModelConfig(name="tiny"), torch.float32), METHODS["lora"].config(method="lora")
        inject_adapters(model, config)
        save_adapter(model, config, folder / "runs" / "mine" / "adapter")
    if "--help" in words:
        assert command_help(command, everyday(command, [word for word in words if word != "--help"]))
    elif command in ("init", "config", "schema", "completion", "models"):
        (folder / "my.yaml").unlink() if command == "init" else None
        assert main([command, *words]) == 0
    elif command == "sweep":
        with pytest.raises(ValueError, match="holds no sweep.json"):  # the words are right, the folder is not there
            sweep(words)
    elif command in ("submit", "estimate") and "-m" in words:
        own, words = split_words(everyday(command, [word for word in words if word != "-m"]))
        planned = plan(compose_config("submit_sweep", own), words)
        for trial in planned.trials or [any_draw(planned)]:
            trial_config(planned, trial, folder / "sweep")
    elif command not in ("demo", "--version"):
        assert command in COMMANDS
        words = everyday(command, [word for word in words if word != "-m"])
        if "-m" in line.split():  # train -m takes one option of a sweep
            compose_config("submit_sweep", [word for word in words if word.startswith("sweep.")])
            words = first_trial([word for word in words if not word.startswith("sweep.")])
        compose_config(command, words)


@pytest.mark.parametrize(("page", "line"), [pair for pair in SHELL_LINES if pair not in COMMAND_LINES and pair[1]])
def test_other_shell_lines_are_known(page, line):
    assert line.startswith(OTHER_LINES)
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", line):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in WRITTEN if blocks(page, "yaml")])
def test_yaml_file_composes(page, folder):
    for block in blocks(page, "yaml"):
        (folder / "run.yaml").write_text(block)
        compose_config("train", everyday("train", ["run.yaml"]))


@pytest.mark.parametrize("page", [page for page in WRITTEN if blocks(page, "toml")])
def test_toml_is_read(page):
    assert all(tomllib.loads(block) for block in blocks(page, "toml"))


@pytest.mark.parametrize("page", [page for page in WRITTEN if blocks(page, "python")])
def test_python_runs(page, tmp_path):
    code = "\n".join(blocks(page, "python"))
    done = run([sys.executable, "-c", code], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    if page == "python.md":
        assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("page", [page for page in WRITTEN if (DOCS / page).exists()])
def test_generated_parts_are_the_codes(page):
    assert WRITTEN[page] == with_generated(WRITTEN[page]), "python docs/generate.py writes them anew"


def test_first_page_of_the_site_is_the_readme():
    assert (DOCS / "index.md").read_text() == index(), "python docs/generate.py writes it anew"


@pytest.mark.parametrize(
    "group", ["model", "method", "target_modules", "hardware", "data", "quantization", "optimizer"]
)
def test_group_table_lists_every_option(group):
    (row,) = [line for line in WRITTEN["options.md"].splitlines() if line.startswith(f"| `{group}` | ")][:1]
    for path in (CONF_DIR / group).glob("*.yaml"):
        assert re.search(rf"\b{path.stem}\b", row), f"{group}={path.stem} is not in docs/options.md"


@pytest.mark.parametrize("name", METHODS)
def test_method_table_says_what_the_row_says(name):
    row = METHODS[name]
    cells = f"`{name}`", row.change, row.paper, row.count
    assert f"| {' | '.join(cells)} |".replace("|  |", "| |") in WRITTEN["methods.md"]


@pytest.mark.parametrize("page", WRITTEN)
def test_links_and_files_exist(page):
    here = ROOT if (ROOT / page).exists() else DOCS
    text = GENERATED.sub("", WRITTEN[page])
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[\w-]+)?\)", text):
        assert (here / target).exists(), target
    folders = "lightning_peft|tests|benchmarks|recipes|slurm|examples|conf|docs"
    for named in re.findall(rf"`((?:{folders})/[\w/.-]*)(?:::\w+)?`", text):
        assert (ROOT / named).exists() or named.endswith("/mine.py") or named.endswith("/mine.yaml"), named


@pytest.mark.parametrize("page", WRITTEN)
def test_named_tests_exist(page):
    file = ""
    for path, name in re.findall(r"`(?:(tests/[\w/]+\.py))?(?:::)?(test_\w+)?`", GENERATED.sub("", WRITTEN[page])):
        file = (ROOT / path).read_text() if path else file
        assert not name or f"def {name}(" in file, f"{path}::{name}"


def test_every_promise_names_a_test():
    for promise in WRITTEN["guarantees.md"].split("\n## ")[1:]:
        assert "`tests/" in promise, promise.splitlines()[0]


def test_readme_is_short():
    assert len(WRITTEN["README.md"].split()) <= 1200
