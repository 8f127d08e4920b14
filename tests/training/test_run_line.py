"""The line of a training run at several widths."""

import time

import pytest

from lightning_peft.training.callbacks.training_progress import RunPart


def run_part(step=1_234, total=10_000, tokens=11_510):
    part = RunPart(total)
    part.loss, part.validation_loss, part.lr, part.memory_gib = 0.3645, 0.4512, 1.95e-4, 21.3
    now = time.monotonic()
    part.looks.extend([(now - 10, step - 20, 0), (now, step, 10 * tokens)])
    part.done = step
    return part


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (80, "╌╌╌╌ 1,234/10,000 loss 0.3645 val 0.4512 lr 1.9e-4 12k tok/s 21 GiB 73 min left"),
        (100, "━╌╌╌╌╌╌  1,234/10,000  loss 0.3645  val 0.4512  lr 1.95e-4  11,510 tok/s  21.3 GiB  1 h 13 min left"),
    ],
)
def test_every_figure_and_a_bar_fit(columns, line):
    shown = run_part().text(columns)
    assert shown == line
    assert len(shown) < columns


def test_narrow_terminal_keeps_step_and_losses():
    assert run_part().text(40) == "╌╌╌ 1,234/10,000 loss 0.3645 val 0.4512"


def test_bar_fills_with_the_whole_run():
    line = run_part(step=5_000).text(160)
    assert line.startswith("━" * 10 + "╌" * 10 + "  5,000/10,000")


def test_time_left_follows_the_last_looks_not_the_slow_first_step():
    part = run_part(step=100, total=1_100)
    assert part.figures()["time"] == "8 min 20 s left"  # 2 steps a second, 1,000 to go
