"""Mixtures of the shapes people train, on random weights: estimated whole, four layers loaded in NF4 and trained."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_peft.__main__ import main
from lightning_peft.models.tiny import tiny_tokenizer

GPT_OSS_20B = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True, "eos_token_id": 200002,
    "head_dim": 64, "hidden_size": 2880, "intermediate_size": 2880, "max_position_embeddings": 131072,
    "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8,
    "num_local_experts": 32, "pad_token_id": 199999, "rms_norm_eps": 1e-5, "sliding_window": 128,
    "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
        "rope_type": "yarn", "truncate": False,
    },
    "rope_theta": 150000, "swiglu_limit": 7.0, "tie_word_embeddings": False, "vocab_size": 201088,
}  # fmt: skip
"""openai/gpt-oss-20b's config.json."""
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False,
    "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_size": 2048, "intermediate_size": 6144,
    "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [], "moe_intermediate_size": 768,
    "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    "tie_word_embeddings": False, "vocab_size": 151936,
}  # fmt: skip
"""Qwen/Qwen3-30B-A3B's config.json."""
SHAPES = {"gpt_oss_20b": (GPT_OSS_20B, 20.9e9), "qwen3_30b_a3b": (QWEN3_30B_A3B, 30.5e9)}
"""Configuration and the parameters that the publisher counts."""
pytestmark = pytest.mark.expert_shapes
WORDS = ["method=qlora", "rank=r8", "adapter.experts=auto", "data.micro_batch_size=1"]


def folder_of(config: dict[str, Any], folder: Path, layers: int) -> str:
    own = {**config, "num_hidden_layers": layers}
    if config is GPT_OSS_20B:
        own["layer_types"] = ["sliding_attention", "full_attention"] * (layers // 2)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(own))
    tiny_tokenizer().save_pretrained(folder)
    return f"model={folder}"


@pytest.mark.parametrize("name", SHAPES)
def test_a_mixture_is_estimated_whole(name: str, tmp_path: Path) -> None:
    config, published = SHAPES[name]
    model = folder_of(config, tmp_path / "model", config["num_hidden_layers"])
    words = [*WORDS, "data.max_length=512", "trainer.precision=bf16-true", "device_memory_gib=80"]
    assert main(["estimate", model, *words, f"output={tmp_path}/estimate.json"]) == 0
    found = json.loads((tmp_path / "estimate.json").read_text())
    stored = {part["name"]: part["at_peak"] for part in found["components"]}
    ends = 2 * config["vocab_size"] * config["hidden_size"]
    assert stored["embeddings"] == 2 * ends
    # All but the ends, norms, biases and routers is 4.127 bits a weight.
    coded = stored["base"] + stored["quantisation scales"]
    assert coded == pytest.approx((published - ends) * 4.127 / 8, rel=0.02)


@pytest.mark.parametrize("name", SHAPES)
def test_four_layers_load_in_nf4_and_train_two_steps(name: str, tmp_path: Path) -> None:
    """The precision is the machine's: in bf16 a processor that has no products for it takes minutes a step.

    12 GiB are half of what a machine for such a run has. fp32 embeddings and head are 4.3 and 2.3 of them, and the four
    layers alone would be 12.8 and 9.7 GiB.
    """
    model = folder_of(SHAPES[name][0], tmp_path / "model", 4)
    words = [
        "train", model, "model.random_weights=true", *WORDS, f"data={tmp_path}/rows.jsonl", "data.max_length=64",
        "trainer.max_steps=2", "trainer.accelerator=cpu", f"run_dir={tmp_path}/run",
    ]  # fmt: skip
    rows = [json.dumps({"prompt": f"Add {a}.", "completion": f"It is {a + 1}."}) + "\n" for a in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    subprocess.run([sys.executable, "-m", "lightning_peft", *words], check=True)
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["steps"] == 2 and result["peak_memory_gib"] < 12
