"""Python's collector of garbage: a command does not look through what its imports have made, and else it works."""

import gc
import os
import subprocess
import sys

import pytest

from lightning_peft.__main__ import main

SEEN = """
import gc
from pathlib import Path
from lightning.pytorch import Callback

class Seen(Callback):
    def on_train_start(self, trainer, pl_module):
        Path("seen").write_text(f"{gc.isenabled()} {gc.get_freeze_count() > 100_000} {len(gc.get_objects()) < 200_000}")
"""


@pytest.mark.slow
def test_a_run_looks_through_what_its_imports_have_made_no_more(tmp_path):
    (tmp_path / "own.py").write_text(SEEN)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    words = ["model=tiny", "data=rows.jsonl", "trainer.max_steps=1", "logger=none", "callbacks.seen._target_=own.Seen"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "lightning_peft", "train", *words, "run_dir=run", "data.validation_fraction=0"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "seen").read_text() == "True True True"


def test_a_caller_of_a_command_keeps_the_collector_as_it_was(capsys):
    enabled, frozen = gc.isenabled(), gc.get_freeze_count()
    assert main(["config", "train", "model=tiny"]) == 0
    assert (gc.isenabled(), gc.get_freeze_count()) == (enabled, frozen)
