"""Adapters on published low-bit bases under DDP and FSDP, and resumed: what one process trains in one go."""

from pathlib import Path

import pytest
import torch
from families import small_model
from published_checkpoints import PUBLISHED, publish, publish_experts, publish_mxfp4
from rank_runs import KINDS, NOISE, adapter, column, train_every_way

from lightning_peft.models.tiny import tiny_tokenizer

BASES = ("fp8_blocks", "gptq_desc_act", "moe_awq", "mxfp4")
ROOM = {"vocab_size": 320, "max_position_embeddings": 2048}


def published(folder: Path, base: str) -> Path:
    path = folder / f"{base}_model"
    if base == "mxfp4":
        publish_mxfp4(small_model("gpt_oss", **ROOM), path, folder / "dense")
    elif base.startswith("moe_"):
        publish_experts(small_model("qwen3_moe", **ROOM), path, PUBLISHED[base.removeprefix("moe_")], folder / "dense")
    else:
        publish(small_model("llama", **ROOM), path, PUBLISHED[base])
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    words = ["model=hf", "method=lora", "rank=r4", "schedule=constant", "quantization.verify=true"]
    train_every_way(folder, {base: [*words, f"model.path={published(folder, base)}"] for base in BASES})
    return folder


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", BASES)
def test_ranks_train_as_one_process_does(runs: Path, base: str, kind: str) -> None:
    one, two = runs / base, runs / f"{base}_{kind}"
    for name in ("loss", "grad_norm"):
        torch.testing.assert_close(column(two, name), column(one, name), **NOISE)
    trained, expected = adapter(two), adapter(one)
    assert trained.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(trained[name], expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("base", BASES)
def test_a_resumed_run_is_the_one_that_never_stopped(runs: Path, base: str) -> None:
    expected = adapter(runs / base)
    for name, tensor in adapter(runs / f"{base}_halves").items():
        assert torch.equal(tensor, expected[name]), name
