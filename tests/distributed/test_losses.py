"""Any number of processes computes what one process computes on the same global batch."""

import json

import pytest
import torch
from rank_runs import adapter, column, result, train_on_ranks

BASES = {"dense": ["method=lora"], "nf4": ["method=qlora", "quantization.verify=true"]}
STEPS = ["trainer.max_steps=5", "data.packing=true", "data.max_length=512", "data.on_too_long=skip"]
SAMPLES = ["method=qlora", "trainer.max_steps=1", "validation.every_n_steps=1", "validation.samples=2"]
FP32_NOISE = {"rtol": 2e-5, "atol": 2e-6}
"""Sums over the ranks are taken in another order."""


def global_batch_of_4(ranks: int) -> list[str]:
    """Return the words for micro_batch_size x accumulate_grad_batches x ranks: 1 x 4 x 1, 1 x 2 x 2, 1 x 1 x 4."""
    return [*STEPS, f"trainer.accumulate_grad_batches={4 // ranks}"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("losses")
    one = {f"single1_{base}": [*words, *global_batch_of_4(1)] for base, words in BASES.items()}
    train_on_ranks(1, folder, one | {"samples1": SAMPLES})
    for ranks in (2, 4):
        several = {
            f"{kind}{ranks}_{base}": [*words, f"strategy={kind}", *global_batch_of_4(ranks)]
            for kind in ("ddp", "fsdp")
            for base, words in BASES.items()
        }
        if ranks == 2:
            several |= {f"{kind}_compiled": [*several[f"{kind}2_nf4"], "compile=blocks"] for kind in ("ddp", "fsdp")}
            offloaded = ["strategy.cpu_offload=true", "activation_checkpointing=elementwise"]
            several["fsdp_offloaded"] = [*several["fsdp2_nf4"], *offloaded]
            several["samples2"] = [*SAMPLES, "strategy=fsdp"]
        train_on_ranks(ranks, folder, several)
    return folder


@pytest.mark.multi_process
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", ["ddp2", "fsdp2", "ddp4", "fsdp4"])
def test_steps_equal_those_of_one_process(runs, kind, base):
    one, several = runs / f"single1_{base}", runs / f"{kind}_{base}"
    assert len(column(one, "loss")) == 5
    for name in ("loss", "grad_norm", "supervised_tokens", "tokens", "lr"):
        torch.testing.assert_close(column(several, name), column(one, name), **FP32_NOISE)
    assert result(several)["validation_loss"] == pytest.approx(result(one)["validation_loss"], rel=2e-5)
    trained, expected = adapter(several), adapter(one)
    assert trained.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(trained[name], expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.multi_process
@pytest.mark.parametrize("kind", ["ddp_compiled", "fsdp_compiled", "fsdp_offloaded"])
def test_other_ways_to_take_the_steps_equal_one_process(runs, kind):
    for name in ("loss", "grad_norm"):
        torch.testing.assert_close(column(runs / kind, name), column(runs / "single1_nf4", name), **FP32_NOISE)


@pytest.mark.multi_process
def test_losses_fall_and_differ_between_bases(runs):
    # Equal losses above are not equal for want of training then.
    losses = column(runs / "single1_dense", "loss")
    assert losses[-1] < losses[0] - 0.1
    assert column(runs / "single1_nf4", "loss") != losses


@pytest.mark.multi_process
def test_sharded_model_writes_the_samples_of_a_whole_one(runs):
    whole, sharded = (
        [json.loads(line) for line in (runs / name / "samples.jsonl").read_text().splitlines()]
        for name in ("samples1", "samples2")
    )
    assert len(whole) == 2 and all(row["answer"] for row in whole)
    for key in ("prompt", "base", "reference"):  # the adapters after a step differ: another global batch
        assert [row[key] for row in sharded] == [row[key] for row in whole]
    assert all(row["answer"] for row in sharded)
