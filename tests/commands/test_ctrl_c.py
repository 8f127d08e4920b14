"""Ctrl-C while a command still imports: one line and status 130, wherever it was."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_peft
from lightning_peft.ctrl_c import is_caused_by_ctrl_c, is_command

SCRIPT = str(Path(sys.executable).parent / "lightning-peft")
PRESS = """
import os, signal, sys

class Press:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["PRESS_AT"]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Press())
"""


LEAVES = "SIGINT: leaving at once; resume=auto goes on from the last checkpoint, or begins anew without one"


@pytest.mark.parametrize(
    ("command", "words", "place", "line"),
    [
        ("-m", ["sweep", "status", "x"], "typing", "interrupted"),
        ("script", ["sweep", "status", "x"], "difflib", "interrupted"),
        ("-m", ["sweep", "status", "x"], "lightning_peft.threads", "interrupted"),
        ("-m", ["report", "x"], "hydra.core.default_element", "interrupted"),
        ("-m", ["report", "x"], "lightning_peft.commands.report", "interrupted"),
        ("-m", ["train", "x"], "lightning_peft.training", "interrupted"),
        ("-m", ["train", "x"], "hydra", LEAVES),
    ],
)
def test_ctrl_c_during_an_import_is_one_line(tmp_path, command, words, place, line):
    (tmp_path / "sitecustomize.py").write_text(PRESS)
    paths = [str(tmp_path), str(Path(lightning_peft.__file__).parent.parent)]
    start = [sys.executable, "-m", "lightning_peft"] if command == "-m" else [sys.executable, SCRIPT]
    done = subprocess.run(
        [*start, *words], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PRESS_AT": place, "PYTHONPATH": os.pathsep.join(paths)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"{line}\n")


def test_error_that_an_interrupted_import_makes_is_told_from_others():
    class Descriptor:
        def __set_name__(self, owner: type, name: str) -> None:
            raise KeyboardInterrupt

    with pytest.raises((RuntimeError, KeyboardInterrupt)) as found:  # Python 3.12 hands on what was raised
        type("Owner", (), {"field": Descriptor()})
    assert is_caused_by_ctrl_c(found.value) and not is_caused_by_ctrl_c(ValueError("other"))
    first, second = ValueError("of the second"), ValueError("of the first")
    first.__cause__, second.__cause__ = second, first
    assert not is_caused_by_ctrl_c(first)


def is_command_in_a_worker(results: "multiprocessing.SimpleQueue[bool]") -> None:
    sys.argv[0] = "lightning-peft"
    results.put(is_command())


def test_worker_of_the_command_is_not_the_command():
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    worker = context.Process(target=is_command_in_a_worker, args=(results,))
    worker.start()
    assert results.get() is False
    worker.join()


def test_program_that_imports_the_package_keeps_its_ctrl_c():
    shows = "import signal, lightning_peft; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    done = subprocess.run(
        [sys.executable, "-c", shows], capture_output=True, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )  # fmt: skip
    assert done.stdout == "True\n", done.stderr
