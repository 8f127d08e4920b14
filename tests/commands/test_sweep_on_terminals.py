"""The output of `sweep status` and `sweep table` on narrow terminals and in a pipe: all names and numbers."""

import fcntl
import json
import os
import pty
import struct
import termios
from pathlib import Path

import pytest
from started import COMMAND, Started
from terminals import all_written_to

from lightning_peft.__main__ import main
from lightning_peft.sweeps.sweep import Sweep, Trial, write_sweep
from lightning_peft.terminal_table import print_rows

METRIC = "execution_accuracy"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a sweep of trials whose names differ at their ends."""
    folder = tmp_path_factory.mktemp("sweep")
    trials = []
    for number, (rank, seed) in enumerate([(4, 0), (4, 1), (64, 0), (64, 1)]):
        name = f"alpha32_dropout0.05_lr1.5e-4_rank{rank}_seed{seed}"
        result = {
            "status": "finished", "validation_loss": 1.2345 + number, "train_loss": 11.5 + number, "steps": 12_000,
            "trainable_parameters": 1000 * rank, "tokens_per_second": 111_510.4, "seconds": 4_400.0,
            "metrics": {METRIC: 0.625 + number / 16},
        }  # fmt: skip
        (folder / name).mkdir()
        (folder / name / "result.json").write_text(json.dumps(result))
        trials.append(Trial(name, [f"adapter.rank={rank}", f"seed={seed}"], attempts=1, is_waiting=False, exit_code=0))
    write_sweep(Sweep([], ["adapter.rank=4,64", "seed=0,1"], "local", f"-{METRIC}", count=4, trials=trials), folder)
    return folder


def on_terminal(words: list[str], columns: int) -> list[str]:
    """Return the lines that a command writes to a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    process = Started([*COMMAND, *words], stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    written = all_written_to(ours)
    os.close(ours)
    assert process.wait() == 0, written
    return written.decode().replace("\r\n", "\n").splitlines()


def assert_all_is_there(lines: list[str], folder: Path, verb: str) -> None:
    for trial in folder.glob("*_seed*"):
        assert any(trial.name in line for line in lines), trial.name
    text = "\n".join(lines)
    assert "…" not in text and all(number in text for number in NUMBERS[verb]), text


NUMBERS = {"status": ["0.625", "0.8125"], "table": ["12,000", "1.2345", "4.2345", "14.5000", "111,510", "73 min"]}


@pytest.mark.parametrize("verb", ["status", "table"])
@pytest.mark.parametrize("columns", [40, 60, 100])
def test_narrow_width_cuts_no_name_and_no_number(folder, capsys, monkeypatch, verb, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["sweep", verb, str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert_all_is_there(lines, folder, verb)
    last = next(number for number, line in enumerate(lines) if line.startswith(("4 trials:", "best ")))
    assert [line for line in lines[:last] if len(line) > columns and line.strip() not in os.listdir(folder)] == []


@pytest.mark.slow
def test_terminal_of_40_columns_shows_all_of_the_table(folder):
    lines = on_terminal(["sweep", "table", str(folder)], 40)
    assert_all_is_there(lines, folder, "table")
    assert max(len(line) for line in lines if line.startswith("  ")) <= 40


@pytest.mark.parametrize("verb", ["status", "table"])
def test_pipe_has_a_line_a_trial_and_the_number_it_is_sorted_by(folder, capsys, monkeypatch, verb):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert main(["sweep", verb, str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert_all_is_there(lines, folder, verb)
    rows = [line.split() for line in lines if " finished " in line and "trials" not in line]
    column = 4 if verb == "status" else 2
    assert lines[1].split()[0] == "trial" or lines[2].split()[0] == "trial"
    assert sorted(row[0] for row in rows) == sorted(path.name for path in folder.glob("*_seed*"))
    found = [row[column] for row in rows]
    assert found == (sorted(found) if verb == "status" else ["0.8125", "0.75", "0.6875", "0.625"])


def test_folder_with_an_equals_sign_is_a_folder(folder, capsys, monkeypatch):
    (folder.parent / "lr=1").symlink_to(folder)
    monkeypatch.chdir(folder.parent)
    assert main(["sweep", "status", "lr=1"]) == 0
    assert "4 trials:" in capsys.readouterr().out


def test_value_in_brackets_is_no_markup(capsys):
    print_rows("trial", ("targets",), [("targets=[q_proj,v_proj]", ["[/]"])])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "targets=" in line]
    assert line.split() == ["targets=[q_proj,v_proj]", "[/]"]
