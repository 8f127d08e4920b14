"""A run that diverges ends as diverged, with what it had before, and never as a finished one."""

import json
import subprocess
import sys

import pytest
from tiny_runs import TINY, tiny_config
from torch import nn

from lightning_peft.commands.train import train
from lightning_peft.training.guard import Diverged, Guard, GuardConfig

RUN = ["trainer.max_steps=12", "checkpoint.every_n_steps=2", "data.packing=false", "resume=auto"]


def test_exploding_rate_ends_the_run_as_diverged(tmp_path):
    command = [
        sys.executable,
        "-m",
        "lightning_peft",
        "train",
        *TINY,
        *RUN,
        "optimizer.lr=1e30",
        f"run_dir={tmp_path}/r",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert "diverged at step 2: loss nan" in done.stderr and "is not finite" in done.stderr
    assert "Traceback" not in done.stderr
    result = json.loads((tmp_path / "r" / "result.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert (result["status"], result["train_loss"]) == ("diverged", None)
    assert not (tmp_path / "r" / "adapter").exists()


def test_checkpoints_of_before_stay_and_the_run_goes_on_at_a_lower_rate(tmp_path):
    explode = "+callbacks.explode={_target_: signalling.ExplodeAt, step: 5}"
    with pytest.raises(Diverged):
        train(tiny_config(tmp_path / "r", *RUN, explode))
    names = sorted(path.name for path in (tmp_path / "r" / "checkpoints").glob("*.ckpt"))
    assert names == ["step-00000002.ckpt", "step-00000004.ckpt"]
    result = train(tiny_config(tmp_path / "r", *RUN))
    assert (result["status"], result["steps"]) == ("finished", 12)


def test_values_read_in_tens_are_looked_at_before_a_checkpoint(tmp_path):
    explode = "+callbacks.explode={_target_: signalling.ExplodeAt, step: 3}"
    with pytest.raises(Diverged):
        train(tiny_config(tmp_path / "r", *RUN, explode, "trainer.log_every_n_steps=10"))
    assert [path.name for path in (tmp_path / "r" / "checkpoints").glob("*.ckpt")] == ["step-00000002.ckpt"]


def values(loss: float, norm: float = 1.0) -> dict[str, float]:
    return {"loss": loss, "grad_norm": norm}


def test_loss_far_above_its_median_counts_after_some_steps():
    guard = Guard(GuardConfig(factor=3, patience=4))
    for step in range(30):
        guard.look(step, values(2.0 + 0.1 * (step % 3)), nn.Identity())
    for step in range(3):
        guard.look(30 + step, values(9.0), nn.Identity())
    guard.look(33, values(2.0), nn.Identity())
    for step in range(3):
        guard.look(34 + step, values(9.0), nn.Identity())
    with pytest.raises(Diverged):
        guard.look(37, values(9.0), nn.Identity())


def test_falling_loss_never_counts():
    guard = Guard(GuardConfig(factor=1.5, patience=1))
    for step in range(300):
        guard.look(step, values(5.0 / (1 + step)), nn.Identity())


def test_overflow_under_a_scaler_is_left_to_it():
    Guard(GuardConfig(), has_scaled_gradients=True).look(1, values(2.0, float("inf")), nn.Identity())
    with pytest.raises(Diverged):
        Guard(GuardConfig()).look(1, values(2.0, float("inf")), nn.Identity())


def test_guard_can_be_told_to_go_on(tmp_path):
    config = tiny_config(tmp_path / "r", *RUN[:1], "optimizer.lr=1e30", "guard.action=none", "data.packing=false")
    assert train(config)["status"] == "finished"
    result = json.loads((tmp_path / "r" / "result.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert result["train_loss"] is None


@pytest.mark.parametrize("words", [["guard.factor=1"], ["guard.patience=0"]])
def test_wrong_guard_is_named(tmp_path, words):
    with pytest.raises(ValueError, match=f"{words[0]}.*: must be "):
        tiny_config(tmp_path, *words)
