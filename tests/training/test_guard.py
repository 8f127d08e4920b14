"""A run that diverges ends as diverged, with what it had before, and never as a finished one."""

import csv
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import started
import torch
from safetensors.torch import load_file
from tiny_runs import TINY, tiny_config
from torch import nn

from lightning_peft.checkpoint.resume import checkpoint_path
from lightning_peft.commands.train import train
from lightning_peft.commands.training import prepare_folder
from lightning_peft.runs.folder import RunStart, find_start
from lightning_peft.runs.rollback import Rollback, roll_back, rollbacks_of, taken_along, write_rollbacks
from lightning_peft.training.config import GuardAction, GuardConfig
from lightning_peft.training.guard import Diverged, Guard
from lightning_peft.training.preemption import Paused

RUN = ["trainer.max_steps=12", "checkpoint.every_n_steps=2", "data.packing=false", "resume=auto"]


def test_exploding_rate_ends_the_run_as_diverged(tmp_path):
    done = started.run([*started.COMMAND, "train", *TINY, *RUN, "optimizer.lr=1e30", f"run_dir={tmp_path}/r"])
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


ONCE = "+callbacks.explode={_target_: signalling.ExplodeAt, step: 7, once: true}"
ALWAYS = "+callbacks.explode={_target_: signalling.ExplodeAt, step: 5}"
SHORT = ["trainer.max_steps=8", *RUN[1:]]


def rows_of(run_dir: Path) -> dict[int, dict[str, str]]:
    rows = list(csv.DictReader((run_dir / "metrics.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows if row["loss"]] == list(range(1, 9))
    return {int(row["step"]): row for row in rows if row["loss"]}


def adapter_of(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "adapter" / "adapter_model.safetensors")


def assert_same_bits(one: Path, other: Path) -> None:
    tensors, others = adapter_of(one), adapter_of(other)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)


def test_rollback_is_the_run_resumed_at_a_lower_rate(tmp_path):
    """It goes on from step 6, bit for bit, also where the run is paused behind it before it saves again."""
    with pytest.raises(Paused):
        train(tiny_config(tmp_path / "by_hand", *SHORT, "pause_at=6"))
    full = float(list(csv.DictReader((tmp_path / "by_hand" / "metrics.csv").read_text().splitlines()))[-1]["lr"])
    write_rollbacks([Rollback(7, 6, 0.25, "by hand")], tmp_path / "by_hand")
    train(tiny_config(tmp_path / "by_hand", *SHORT))
    rollback = [*SHORT, "guard.action=rollback", "guard.lr_factor=0.25", ONCE]
    with pytest.raises(Paused):
        train(tiny_config(tmp_path / "r", *rollback, "pause_at=7"))
    result = train(tiny_config(tmp_path / "r", *rollback))
    assert (result["status"], result["rollbacks"], result["lr_factor"]) == ("finished", 1, 0.25)
    (found,) = rollbacks_of(tmp_path / "r")
    assert (found.diverged_at, found.back_to) == (7, 6) and "norm of the gradient inf" in found.reason
    assert_same_bits(tmp_path / "r", tmp_path / "by_hand")
    rates = [float(row["lr"]) for row in rows_of(tmp_path / "r").values()]
    assert rates[6] < 0.25 * full < rates[5]


@pytest.mark.multi_process
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_roll_back_together(tmp_path, strategy):
    words = [*TINY, *SHORT, f"strategy={strategy}", "trainer.devices=2", "guard.action=rollback", ONCE]
    words += ["health.every_n_steps=4", "guard.no_op_steps=4"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = started.run([*started.COMMAND, "train", *words, f"run_dir={tmp_path}/r"], env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert (result["status"], result["rollbacks"], result["lr_factor"]) == ("finished", 1, 0.5)
    assert done.stderr.count("back to step 6, and on at 0.5 times the learning rate") == 1
    rows = rows_of(tmp_path / "r")
    assert float(rows[4]["health/model.layers.0.self_attn.q_proj/change"]) > 0


@pytest.mark.slow
def test_rollback_before_the_first_checkpoint_starts_again_and_is_bounded(tmp_path, caplog):
    words = [*RUN, "checkpoint.every_n_steps=6", "guard.action=rollback", "guard.max_rollbacks=2", ALWAYS]
    with pytest.raises(Diverged):
        train(tiny_config(tmp_path / "r", *words))
    assert [(r.back_to, r.lr_factor) for r in rollbacks_of(tmp_path / "r")] == [(0, 0.5), (0, 0.25)]
    assert "rollback 2 of guard.max_rollbacks=2: back to step 0" in caplog.text
    assert "the guard.max_rollbacks=2 rollbacks are used up" in caplog.text
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert (result["status"], result["rollbacks"], result["diverged"]["step"]) == ("diverged", 2, 5)


def checkpoint_of(step: int, folder: Path, above: int = 0) -> Path:
    path = checkpoint_path(folder / "checkpoints", step)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"global_step": step, "guard": {"above": above}, "callbacks": {}}, path)
    return path


def test_rollback_steps_back_over_a_damaged_checkpoint(tmp_path, caplog):
    kept, _, newest = checkpoint_of(2, tmp_path), checkpoint_of(4, tmp_path, above=1), checkpoint_of(6, tmp_path)
    newest.write_bytes(newest.read_bytes()[:-40])
    assert roll_back(GuardConfig(), tmp_path, 7, "by hand") == kept
    assert "step-00000006.ckpt: truncated" in caplog.text and rollbacks_of(tmp_path)[0].back_to == 2


def test_rollbacks_behind_another_folders_checkpoint_are_left_there(tmp_path, caplog):
    one, other = tmp_path / "one", tmp_path / "other"
    path = checkpoint_of(4, one)
    write_rollbacks([Rollback(5, 4, 0.5, "first"), Rollback(9, 8, 0.25, "second")], one)
    assert taken_along(other, path) == rollbacks_of(other) == rollbacks_of(one)[:1]
    assert "the learning rate is 0.5 times the given one" in caplog.text
    assert len(taken_along(one, path)) == 2
    assert taken_along(tmp_path / "third", checkpoint_of(3, one)) == [] and not (tmp_path / "third").exists()


def test_rollbacks_of_a_run_that_begins_anew_are_dropped_with_its_options(tmp_path, caplog):
    run_dir = tmp_path / "r"
    before, now = tiny_config(run_dir, *RUN), tiny_config(run_dir, *RUN, "optimizer.lr=0.003")
    prepare_folder(before, run_dir)
    write_rollbacks([Rollback(1, 0, 0.5, "by hand")], run_dir)
    for config, kept in ((before, True), (replace(now, dry_run=True), True), (now, False)):
        assert find_start(config, run_dir) == RunStart()
        assert bool(rollbacks_of(run_dir)) is kept
    assert "dropped, as this run begins anew (resume: the checkpoint was made with another config: optimizer.lr" in (
        caplog.text
    )


SLOW = [pytest.param(word, marks=pytest.mark.slow) for word in ("optimizer=adamw_8bit", "method=adalora")]


@pytest.mark.parametrize("words", ["method=lora", *SLOW])
def test_skipped_step_moves_nothing(tmp_path, words, caplog):
    skip = "guard.action=skip"
    result = train(tiny_config(tmp_path / "r", *SHORT, words, skip, ALWAYS))
    assert (result["status"], result["steps_left_out"]) == ("finished", 1)
    assert "step 5 is left out: loss " in caplog.text and "1 of the run so far, 1 in a row" in caplog.text
    drop = "+callbacks.drop={_target_: signalling.DropGradientsAt, step: 5}"
    train(tiny_config(tmp_path / "without", *SHORT, words, skip, drop))
    assert_same_bits(tmp_path / "r", tmp_path / "without")


def test_skipping_ends_after_patience_and_at_a_broken_weight():
    guard = Guard(GuardConfig(action=GuardAction.skip, patience=3))
    for step in (1, 2, 4, 5):
        guard.look(step, values(math.nan), nn.Linear(2, 2))
        if step == 2:
            guard.look(3, values(2.0), nn.Linear(2, 2))
    assert (guard.left_out, guard.is_calm) == (4, False)
    with pytest.raises(Diverged) as found:
        guard.look(6, values(2.0, math.inf), nn.Linear(2, 2))
    assert "the last of guard.patience=3 steps left out in a row" in found.value.reason
    broken = nn.Linear(2, 2)
    broken.weight.data[0] = math.inf
    with pytest.raises(Diverged) as found:
        Guard(GuardConfig(action=GuardAction.skip)).look(1, values(math.nan), broken)
    assert "leaving steps out mends no weight" in found.value.reason


def test_checkpoint_waits_for_a_loss_that_is_far_above(tmp_path):
    """A checkpoint written while the loss explodes would push out what can be gone back to."""
    guard = Guard(GuardConfig(factor=3, patience=4))
    for step in range(30):
        guard.look(step, values(2.0), nn.Identity())
    guard.look(30, values(9.0), nn.Identity())
    assert not guard.is_calm
    kept = Guard(GuardConfig(factor=3, patience=4))
    kept.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    kept.look(31, values(9.0), nn.Identity())
    kept.look(32, values(9.0), nn.Identity())
    with pytest.raises(Diverged):
        kept.look(33, values(9.0), nn.Identity())


@pytest.mark.parametrize("words", [["method=lora"], ["method=dora"]], ids=" ".join)
def test_adapter_that_changes_nothing_counts_as_diverged(tmp_path, words, caplog):
    run = [*RUN, *words, "guard.no_op_steps=3", "guard.action=rollback"]
    with pytest.raises(Diverged):
        train(tiny_config(tmp_path / "r", *run, "optimizer.lr=1e-30"))
    assert "diverged at step 3: the adapter still changes nothing" in caplog.text
    assert not rollbacks_of(tmp_path / "r")


def test_adapter_that_learns_slowly_is_no_op_no_longer(tmp_path):
    config = tiny_config(tmp_path / "r", *RUN, "guard.no_op_steps=3", "optimizer.lr=1e-6")
    assert train(config)["status"] == "finished"


@pytest.mark.parametrize(
    "words",
    [
        ["guard.factor=1"],
        ["guard.patience=0"],
        ["guard.lr_factor=1"],
        ["guard.max_rollbacks=0"],
        ["guard.no_op_steps=0"],
    ],
)
def test_wrong_guard_is_named(tmp_path, words):
    with pytest.raises(ValueError, match=f"{words[0]}.*: must be "):
        tiny_config(tmp_path, *words)
