"""Every trainer gets the same rows in the same order, and reaches the same losses."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks.compare import main, summarise
from benchmarks.machine import describe_machine
from benchmarks.rivals import pad, training_arguments
from benchmarks.turns import ROOT
from benchmarks.workloads import Workload, write_steps
from lightning_peft.compose import compose_config
from lightning_peft.data.datamodule import SFTDataModule
from lightning_peft.models.tiny import tiny_model, tiny_tokenizer
from lightning_peft.objectives.sft import SupervisedLoss


@pytest.mark.parametrize("workload", [Workload("long", 2, 64), Workload("short", 1, 512, packed=True)])
def test_token_rows_are_those_that_train_reads(workload, tmp_path):
    overrides = ["model=tiny", *workload.write_rows(tmp_path, 2)]
    tokens = write_steps(overrides, tmp_path, 2)
    steps = json.loads((tmp_path / "steps.json").read_text())
    rows = [row for step in steps for row in step]
    assert len(steps) == 2 and sum(len(row["input_ids"]) for row in rows) == tokens
    assert all(row["labels"][0] == -100 for row in rows)
    assert all(label in (-100, token) for row in rows for token, label in zip(*row.values(), strict=True))
    if not workload.packed:
        assert [len(row["input_ids"]) for row in rows] == [64] * 4


def test_padded_rows_give_the_loss_of_packed_ones(tmp_path):
    """HF's loss over the padded rows of a step is ours over the packed ones."""
    overrides = ["model=tiny", *Workload("short", 1, 1024, packed=True).write_rows(tmp_path, 1)]
    write_steps(overrides, tmp_path, 1)
    (step,) = json.loads((tmp_path / "steps.json").read_text())
    padded = pad([{key: [row[key] for row in step] for key in ("input_ids", "labels")}])
    config = compose_config("train", overrides)
    data = SFTDataModule(config.data, tiny_tokenizer(), config.seed)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    model = tiny_model()
    assert len(step) > 1
    expected = SupervisedLoss(model)(batch) / batch.num_supervised
    torch.testing.assert_close(model(**padded).loss, expected)


def test_rates_and_ratios_are_medians_of_neighbours_between_the_warm_up_and_the_end():
    side = {"losses": [1.0] * 6, "cpu_seconds": [1.0] * 6, "peak": {"anonymous_gib": 2.0}}
    own = {"seconds": [9.0, 9.0, 1.0, 2.0, 4.0, 90.0], "peak": {"anonymous_gib": 1.0}, "losses": [1.0] * 5 + [1.5]}
    peft = side | {"seconds": [9.0, 9.0, 2.0, 6.0, 20.0, 1.0]}
    row = summarise({"ours": side | own, "peft": peft}, "peft", 100.0, [1.0] * 4 + [0.75, 1.0])
    assert row["ours"]["tokens_per_second"] == 50.0 and row["peft"]["tokens_per_second"] == 100 / 6
    assert (row["speedup"], row["memory_ratio"]) == (3.0, 0.5)
    assert (row["ours"]["largest_loss_error"], row["peft"]["largest_loss_error"]) == (0.5, 0.25)


def test_too_few_steps_are_refused_before_anything_runs(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--steps", "3", "--model", "tiny"])
    assert stopped.value.code == 2 and "--steps=3: must be at least 4" in capsys.readouterr().err


HELD_AND_GONE = """
import time, torch
from benchmarks.memory import PeakMemory
memory = PeakMemory(interval=0.001)
held = torch.ones(64 * 2**20)
# The watcher is a thread: on a busy machine it may not get a turn for longer than its interval.
deadline = time.monotonic() + 30
while memory.peak - memory.before < 0.24 * 2**30 and time.monotonic() < deadline:
    time.sleep(0.01)
total = held.sum()
del held
print(int(total), memory.stop()["anonymous_gib"])
"""


def test_peak_memory_sees_what_is_gone_again():
    # It runs in a process of its own: here an earlier test may have left free memory that new tensors go to.
    command = [sys.executable, "-c", HELD_AND_GONE]
    total, peak = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert int(total) == 64 * 2**20 and 0.24 < float(peak) < 0.3


def test_machine_is_described_without_its_name():
    assert set(describe_machine()) >= {"cpu", "cores", "memory_gib", "cpu_has_bf16"}


def test_rivals_clip_and_keep_the_order():
    arguments = training_arguments(2, 1e-3, torch.float32, "out")
    assert arguments["max_grad_norm"] == 1.0 and arguments["train_sampling_strategy"] == "sequential"
    assert arguments["use_cache"] is False


@pytest.mark.slow
def test_losses_agree_with_every_rival(tmp_path, forked_starts):
    words = ["--model", "tiny", "--steps", "4", "--dtype", "float32", "--workload", "4x512", "short rows"]
    assert main([*words, "--output", f"{tmp_path}/compare.json"]) == 0
    rows = json.loads((tmp_path / "compare.json").read_text())["rows"]
    rivals = {"4x512, peft", "4x512, trl", "short rows, peft", "short rows, trl"}
    assert set(rows) == rivals | {"4x512, HF PEFT in fp32", "short rows, HF PEFT in fp32"}
    for name in rivals:
        sides = [rows[name][side] for side in ("ours", name.partition(", ")[2])]
        assert all(side["largest_loss_error"] < 2e-6 and side["losses"][2] < side["losses"][0] for side in sides)
