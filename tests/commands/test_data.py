import json
import struct
import zlib

import pytest

from lightning_peft.__main__ import main

ROWS = [{"prompt": f"Question {n}", "completion": "Answer " * (1 + n % 5)} for n in range(40)]


@pytest.fixture
def words(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return ["data", "model=tiny", "data=jsonl", f"data.train_path={path}", "data.cache_dir=null"]


def test_samples_audit_and_lengths_are_shown_without_a_model(words, tmp_path, capsys):
    assert main([*words, "samples=2", f"histogram_path={tmp_path}/lengths.png"]) == 0
    shown = capsys.readouterr().out
    assert "sample 2" in shown and "Question 1" in shown and "lengths of samples" in shown
    assert "samples of" in shown and "[[answer: Answer" in shown  # where there are no colours
    png = (tmp_path / "lengths.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", png[16:24]) == (480, 240)
    size = struct.unpack(">I", png[33:37])[0]
    assert len(zlib.decompress(png[41 : 41 + size])) == 240 * 481


def test_exit_status_tells_of_bad_rows_and_with_strict_of_warnings(words, tmp_path, capsys):
    assert main([*words, "data.max_length=40"]) == 0
    assert main([*words, "data.max_length=40", "strict=true"]) == 2
    assert "strict=true: " in capsys.readouterr().err
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Hi"}\n')
    assert main(words) == 2


def test_streamed_rows_are_shown_without_the_length_of_a_run(words, capsys):
    streamed = [*words, "data.streaming=true", "data.shuffle_window=10", "samples=1"]
    assert main(streamed) == 0
    assert "10 samples of 10 rows" in capsys.readouterr().out
    assert main(["train", *streamed[1:-1]]) == 2
    assert "so give trainer.max_steps" in capsys.readouterr().err


def test_rows_that_hold_none_out_cost_one_line(words, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:8]))
    assert main(words) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "validation" in line]
    assert [line for line in said if not line.startswith("validation rows: tokenised")] == [
        "no validation: data.validation_fraction=0.05 of 8 rows is none; raise it or give data.validation_path"
    ]
