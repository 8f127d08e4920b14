"""Two processes step in turn, report what they did, and their failures are shown."""

import sys
from pathlib import Path

import pytest

from benchmarks.turns import run_in_turns

TAKER = Path(__file__).parent / "turn_takers.py"


def test_steps_alternate_and_are_reported(tmp_path):
    commands = {name: [sys.executable, str(TAKER), name, f"{tmp_path}/order"] for name in "AB"}
    sides = run_in_turns(commands, 3, tmp_path)
    assert (tmp_path / "order").read_text() == "ABABAB"
    assert sides["A"]["losses"] == sides["B"]["losses"] == [0.0, 1.0, 2.0]
    assert sides["B"]["peak"]["anonymous_gib"] > 96 / 1024
    assert all(seconds > 0 for seconds in sides["A"]["seconds"])
    assert sides["A"]["first_step_seconds"] == sides["A"]["start_seconds"] + sides["A"]["seconds"][0]


def test_failed_process_is_named_with_its_output(tmp_path):
    commands = {"fails": [sys.executable, str(TAKER), "fails", f"{tmp_path}/order"]}
    with pytest.raises(RuntimeError, match="fails ended early:\n.*no memory left"):
        run_in_turns(commands, 3, tmp_path)
