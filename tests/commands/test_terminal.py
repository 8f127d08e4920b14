"""The display of a training: captures of real runs on pseudo-terminals of 80 and 100 columns, and in a pipe."""

import json
import re
import subprocess
from collections import Counter

import pytest
from terminals import COMMAND, run_in_terminal

NOISE = ("Epoch", "GPU available", "TPU", "litlogger", "weights_only", "srun", "it/s", "Trainer.fit", "💡")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("terminal")
    rows = [{"prompt": f"What is {i} plus {i}?", "completion": f"It is {2 * i}."} for i in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def words(run_dir, *more):
    return [
        "train", "model=tiny", "data=jsonl", "data.train_path=rows.jsonl", "data.validation_fraction=0.2",
        "data.cache_dir=null", "data.micro_batch_size=2", "trainer.max_steps=12", "checkpoint.every_n_steps=3",
        "validation.every_n_steps=6", f"run_dir={run_dir}", *more,
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 100])
def test_training_has_one_bar_that_nothing_tears(columns, folder):
    capture = run_in_terminal(words(f"at_{columns}"), columns, folder)
    assert capture.exit_status == 0, capture.text
    assert [frame for frame in capture.frames if len(frame) >= columns] == []
    last = [frame for frame in capture.frames if "12/12" in frame][-1]
    assert re.search(r"━ +12/12 +loss \d\.\d{4} +val \d\.\d{4} +lr 0 .* tok/s +\d\.\d GiB +0 s left", last)
    # Log lines and the table stay, whole: nothing of the bar, and no line twice.
    left = "\n".join(capture.screen)
    assert "tok/s" not in left and "━" not in left
    assert "finished: at_" in left
    assert [word for word in NOISE if word in capture.text] == []
    messages = [line for line in capture.screen if line and line[0] not in "┌│└├"]
    assert [line for line, count in Counter(messages).items() if count > 1] == []


@pytest.mark.slow
def test_paused_and_resumed_run_says_nothing_else(folder):
    run_in_terminal(words("resumed", "trainer.max_time=00:00:00:01", "trainer.max_steps=2000"), 80, folder)
    capture = run_in_terminal(words("resumed", "resume=auto", "trainer.max_time=00:00:00:01"), 80, folder)
    assert [word for word in NOISE if word in capture.text] == []
    assert [line for line in capture.screen if "tok/s" in line] == []


@pytest.mark.slow
def test_a_pipe_gets_plain_lines(folder):
    done = subprocess.run([COMMAND, *words("piped")], cwd=folder, capture_output=True, text=True, check=True)
    assert "\x1b" not in done.stderr + done.stdout and "\r" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("step ")]
    assert re.fullmatch(r"step 1/12  loss \d\.\d{4}  lr \S+  [\d,]+ tok/s  \d\.\d GiB  .* left", lines[0])
    assert re.fullmatch(
        r"step 12/12  loss \d\.\d{4}  val \d\.\d{4}  lr 0  [\d,]+ tok/s  \d\.\d GiB  0 s left", lines[-1]
    )
    assert [word for word in NOISE if word in done.stderr] == []
