"""Under FSDP each rank reads the model block by block and keeps its slices: the same model, without the host memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rank_runs import NOISE, TINY, adapter, column, result, train_on_ranks
from safetensors.torch import save_file
from started import run_on_ranks
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft.models.tiny import tiny_config, tiny_tokenizer

MEASURE = Path(__file__).with_name("measure_loading.py")
BLOCKS = 20
LARGE_TENSORS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""glibc keeps freed tensors under 32 MiB, and so all of this model's; it treats these as those of a large model."""


def save_tiny(folder: Path, **options: object) -> str:
    """Return the overrides for a small model that, unlike model=tiny, is read from a folder."""
    shape = tiny_config(**options)
    shape.attention_bias = True
    torch.manual_seed(0)
    model = LlamaForCausalLM(shape)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return f"model.path={folder}"


CASES = {
    "lora": ["method=lora"],
    "qlora": ["method=qlora", "quantization.verify=true"],
    "fp4": ["method=qlora", "quantization=fp4"],
    "int8": ["method=qlora", "quantization=int8"],
    "qdora": ["method=qdora", "activation_checkpointing=blocks"],
    "vera": ["method=vera", "quantization=nf4"],
    "intrinsic": ["method=intrinsic", "adapter.dimension=60"],
    "pissa": ["method=pissa"],
    "pissa_nf4": ["method=pissa", "quantization=nf4", "quantization.verify=true"],
    "eva": ["method=eva"],
    "full": ["method=full"],
    "biases": ["method=lora", "adapter.bias=all"],
    "norms": ["method=lora", "adapter.trainable_modules=[norm,input_layernorm,lm_head]"],
    "new_tokens": ["method=lora", "model.new_tokens=['<a>','<b>']", "adapter.trainable_modules=[embed_tokens]"],
    "embedding": ["method=lora", "adapter.target_modules=[embed_tokens,q_proj,lm_head]"],
    "tied": ["method=qlora"],
    "random": ["method=qlora", "model.random_weights=true"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded_loading")
    words = {False: save_tiny(folder / "model"), True: save_tiny(folder / "tied_model", tied=True)}

    def every(kind: str, *more: str) -> dict[str, list[str]]:
        return {
            f"{kind}_{case}": [
                "model=hf",
                words[case == "tied"],
                f"strategy={kind}",
                "trainer.max_steps=2",
                *more,
                *own,
            ]
            for case, own in CASES.items()
        }

    single = every("single", "trainer.accumulate_grad_batches=2")
    train_on_ranks(1, folder, single)
    warm = {"single": "trainer.accumulate_grad_batches=2", "fsdp": "trainer.accumulate_grad_batches=1"}
    warm_start = {
        f"{kind}_warm": ["model=hf", words[False], f"strategy={kind}", "trainer.max_steps=2", batches,
                         f"adapter.init_from={folder}/single_lora"]
        for kind, batches in warm.items()
    }  # fmt: skip
    train_on_ranks(1, folder, {"single_warm": warm_start["single_warm"]})
    train_on_ranks(2, folder, every("fsdp") | {"fsdp_warm": warm_start["fsdp_warm"]})
    return folder


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("case", [*CASES, "warm"])
def test_slices_train_as_the_whole_model(runs, case):
    one, two = runs / f"single_{case}", runs / f"fsdp_{case}"
    assert not (two / "error.txt").exists(), (two / "error.txt").read_text()
    for name in ("loss", "grad_norm"):
        torch.testing.assert_close(column(two, name), column(one, name), **NOISE)
    assert result(two)["validation_loss"] == pytest.approx(result(one)["validation_loss"], rel=5e-5)
    if case == "full":
        return
    trained, expected = adapter(two), adapter(one)
    assert trained.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(trained[name], expected[name], rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def large_model(tmp_path_factory):
    """Return a Llama of twenty blocks, 0.5 GB in bf16."""
    folder = tmp_path_factory.mktemp("large_model")
    shape = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=BLOCKS, num_attention_heads=16,
        num_key_value_heads=16, vocab_size=320, max_position_embeddings=2048,
    )  # fmt: skip
    shape.architectures = ["LlamaForCausalLM"]
    shape.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with torch.device("meta"):
        sizes = {name: tensor.shape for name, tensor in LlamaForCausalLM(shape).state_dict().items()}
    noise = torch.randn(2816 * 1024).mul_(0.02).bfloat16()
    tensors = {name: noise[: size.numel()].view(size).clone() for name, size in sizes.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def loading(folder: Path, model: Path, *words: str) -> tuple[list[dict[str, int]], str]:
    """Load on two ranks; return what each measured, and the log."""
    run = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(MEASURE),
            str(folder), *TINY, "model=hf", f"model.path={model}", "strategy=fsdp", "trainer.devices=2", *words,
        ],
        capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1", **LARGE_TENSORS},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads((folder / f"loading-{rank}.json").read_text()) for rank in range(2)], run.stderr


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_rank_holds_its_slices_and_one_block(method, large_model, tmp_path):
    ranks, log = loading(tmp_path, large_model, f"method={method}", "rank=r4")
    assert "host memory at its peak while loading" in log
    for measured in ranks:
        dense_weight = 1024 * 2816 * 4  # there while it is coded
        allowed = measured["blocks"] / 2 + measured["blocks"] / BLOCKS + measured["rest"] + dense_weight + 16e6
        assert measured["peak"] < allowed, measured
        assert measured["peak"] < 0.75 * (measured["blocks"] + measured["rest"]), measured


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize(("init", "reads_whole"), [("kaiming", False), ("loftq", True)])
def test_init_that_reads_the_whole_model_says_so(init, reads_whole, tmp_path):
    save_tiny(tmp_path / "model")
    model = ["model=hf", f"model.path={tmp_path}/model", "method=qlora", f"adapter.init={init}"]
    _, log = run_on_ranks(2, MEASURE, tmp_path, *TINY, *model, "strategy=fsdp", "trainer.devices=2")
    assert ("the adapters' init reads the whole model" in log) == reads_whole
