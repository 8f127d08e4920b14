"""NEFTune's noise: its size is each sample's own, only training has it, and a run with it resumes bit-equal."""

from pathlib import Path

import pytest
import torch
from families import small_model
from safetensors.torch import load_file
from tiny_runs import tiny_config

from lightning_peft.__main__ import main
from lightning_peft.checkpoint.resume import checkpoint_path
from lightning_peft.commands.train import train
from lightning_peft.data.chat import Encoded
from lightning_peft.data.collate import collate
from lightning_peft.models.attention import accept_packed_batches, choose_attention
from lightning_peft.objectives.embedding_noise import noisy_embeddings, sample_lengths
from lightning_peft.objectives.sft import SFTConfig, SupervisedLoss

LENGTHS = (23, 9, 14)


def rows():
    generator = torch.Generator().manual_seed(3)
    found = [torch.randint(3, 90, (length,), generator=generator).tolist() for length in LENGTHS]
    return [Encoded(ids, [-100, *ids[1:]], True) for ids in found]


def batches():
    """Return the samples a row each, and two layouts of them packed."""
    one, two, three = rows()
    return [
        collate([[one], [two], [three]], 0, 32, packing=False),
        collate([[one, two, three]], 0, 64, packing=True),
        collate([[three, two], [one]], 0, 32, packing=True),
    ]


@pytest.fixture
def model():
    found = small_model("llama")
    if (attention := choose_attention(found.config, "auto")) is not None:
        found.set_attn_implementation(attention)
    accept_packed_batches(found)
    return found


def test_length_is_that_of_the_sample_on_every_layout():
    for batch in batches():
        real = batch.labels != -100
        assert set(sample_lengths(batch)[real].tolist()) == set(LENGTHS)
        assert sample_lengths(batch)[real].bincount().nonzero().flatten().tolist() == sorted(LENGTHS)


def test_noise_is_uniform_up_to_alpha_over_root_of_length_times_width(model):
    torch.manual_seed(0)
    embedding, alpha = model.get_input_embeddings(), 5.0
    for batch in batches():
        clean = embedding(batch.input_ids)
        with noisy_embeddings(model, batch, alpha):
            noise = (embedding(batch.input_ids) - clean).detach()
        for length in LENGTHS:
            own = noise[(sample_lengths(batch) == length) & (batch.labels != -100)]
            bound = alpha / (length * clean.shape[-1]) ** 0.5
            # The largest of hundreds of draws of +-1 is above 0.98; the variance of one is 1/3.
            assert 0.98 * bound < float(own.abs().max()) <= bound + 1e-6  # fp32 sums
            assert float(own.square().mean()) == pytest.approx(bound**2 / 3, rel=0.15)
        assert torch.equal(embedding(batch.input_ids), clean)


def test_only_training_has_noise_and_smoothing(model):
    batch = batches()[1]
    asked = SupervisedLoss(model, config=SFTConfig(noise_alpha=5.0, label_smoothing=0.1))
    plain = SupervisedLoss(model)
    assert torch.equal(asked.eval()(batch), plain.eval()(batch))
    asked.train()
    torch.manual_seed(1)
    first = asked(batch)
    torch.manual_seed(1)
    assert torch.equal(first, asked(batch)) and not torch.equal(first, asked(batch))
    assert not torch.isclose(first, plain.train()(batch), rtol=1e-3)


@pytest.mark.slow
def test_resumed_run_with_noise_and_smoothing_ends_bit_equal(tmp_path: Path) -> None:
    options = [
        "objective.noise_alpha=5", "objective.label_smoothing=0.1", "trainer.max_steps=6", "checkpoint.every_n_steps=3",
        "trainer.accumulate_grad_batches=2", "adapter.rank=4", "logger=none",
    ]  # fmt: skip
    train(tiny_config(tmp_path / "whole", *options))
    stopped = checkpoint_path(tmp_path / "whole" / "checkpoints", 3)
    train(tiny_config(tmp_path / "resumed", *options, f"resume={stopped}"))
    whole, resumed = (
        load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("whole", "resumed")
    )
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_wrong_options_are_one_line(capsys):
    for word, said in (
        ("objective.noise_alpha=-1", "objective.noise_alpha=-1.0: must be 0 or more"),
        ("objective.label_smoothing=1", "objective.label_smoothing=1.0: must be at least 0 and below 1"),
    ):
        assert main(["train", "model=tiny", word]) == 2
        assert said in capsys.readouterr().err
