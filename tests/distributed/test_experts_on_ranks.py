"""Adapters of stacked experts under DDP and FSDP, and resumed: what one process trains in one go."""

from pathlib import Path

import pytest
import torch
from families import small_model
from rank_runs import KINDS, NOISE, adapter, column, train_every_way

from lightning_peft.models.tiny import tiny_tokenizer

BASES = {
    "dense": ["quantization=none"],
    "nf4": ["quantization=nf4", "quantization.block_size=32"],
    "shared_A": ["quantization=none", "adapter.experts_share_A=true"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    small_model("gpt_oss", vocab_size=320, max_position_embeddings=2048).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    words = [
        "model=hf",
        f"model.path={folder}/model",
        "method=lora",
        "rank=r4",
        "adapter.experts=3",
        "schedule=constant",
    ]
    train_every_way(folder, {base: [*words, *quantization] for base, quantization in BASES.items()})
    return folder


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", BASES)
def test_ranks_train_experts_as_one_process_does(runs: Path, base: str, kind: str) -> None:
    one, two = runs / base, runs / f"{base}_{kind}"
    for name in ("loss", "grad_norm", "router_load", "router_entropy"):
        torch.testing.assert_close(column(two, name), column(one, name), **NOISE)
    trained, expected = adapter(two), adapter(one)
    assert trained.keys() == expected.keys() and any(".experts." in name for name in expected)
    for name in expected:
        torch.testing.assert_close(trained[name], expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("base", BASES)
def test_a_resumed_run_is_the_one_that_never_stopped(runs: Path, base: str) -> None:
    expected = adapter(runs / base)
    for name, tensor in adapter(runs / f"{base}_halves").items():
        assert torch.equal(tensor, expected[name]), name
