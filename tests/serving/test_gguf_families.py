"""The files of whole models of every family: tensor for tensor what llama.cpp's own converter writes, and read back."""

import json
import re
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from families import FULL, OF_GGUF, small_model
from llama_cpp_models import CASES, FIXTURE, LLAMA_3, YARN, YARN_GLOBALLY, case_model, content
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, SiglipVisionConfig

from lightning_peft.data.layout import PromptLayout
from lightning_peft.models import gguf_metadata
from lightning_peft.models.gguf import GGUFFile
from lightning_peft.models.gguf_families import FAMILIES, SIZES, GGUFModelError
from lightning_peft.models.loading import load_model
from lightning_peft.models.rope import RopeScaling
from lightning_peft.models.source import ModelConfig
from lightning_peft.models.tiny import tiny_tokenizer
from lightning_peft.serving.gguf_model import write_gguf_model

IDS = (torch.arange(30)[None] * 37 + 5) % 300
SAID_HERE_ALONE = {
    "vocab_size", "attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base",
    "attention.sliding_window_pattern",
}  # fmt: skip
"""Fields that the converter leaves to llama.cpp's defaults for some families."""


def written(model: Any, folder: Path) -> Path:
    path = folder / "model.gguf"
    write_gguf_model(model, tiny_tokenizer(), PromptLayout(stop_token_ids=[2]), path, "fp32", None, "small")
    return path


def without_prefix(fields: dict[str, Any]) -> dict[str, Any]:
    return {name.partition(".")[2]: value for name, value in fields.items()}


@pytest.mark.parametrize("case", CASES)
def test_file_is_what_llama_cpp_converts_to(case: str, tmp_path: Path) -> None:
    expected = json.loads(FIXTURE.read_text())[case]
    found = content(written(case_model(case), tmp_path))
    assert found["tensors"] == expected["tensors"]
    ours, theirs = without_prefix(found["fields"]), without_prefix(expected["fields"])
    assert {name: ours.get(name) for name in theirs} == theirs
    assert ours.keys() - theirs.keys() <= SAID_HERE_ALONE


@pytest.mark.parametrize("case", CASES)
def test_file_read_back_has_the_logits(case: str, tmp_path: Path) -> None:
    model = case_model(case)
    read = load_model(ModelConfig("hf", str(written(model, tmp_path))), torch.float32)
    torch.testing.assert_close(read(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", [name for name, each in FAMILIES.items() if "sliding_window" in each.optional])
def test_a_file_without_a_window_is_read_back(family: str, tmp_path: Path) -> None:
    layers = {"num_hidden_layers": 4, "layer_types": [FULL] * 4} if family != "phi3" else {"sliding_window": None}
    model = case_model(family, **layers)
    read = load_model(ModelConfig("hf", str(written(model, tmp_path))), torch.float32)
    torch.testing.assert_close(read(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_heads_that_a_file_does_not_say_are_those_of_q(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixtral's configuration has 8 for keys where nothing is said, and llama.cpp as many as for queries."""
    model = case_model("mixtral", num_key_value_heads=4)
    monkeypatch.delitem(SIZES, "attention.head_count_kv")
    path = written(model, tmp_path)
    monkeypatch.undo()
    assert "llama.attention.head_count_kv" not in GGUFFile(path).fields
    read = load_model(ModelConfig("hf", str(path)), torch.float32)
    torch.testing.assert_close(read(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_frequencies_of_a_base_file_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Divisors that are not Llama 3's have no words in transformers, and the base's file has them."""
    divisors = torch.linspace(1, 7, 8)
    monkeypatch.setattr(gguf_metadata, "llama_3_factors", lambda rope, width: divisors)
    base = written(case_model("llama with scaled positions"), tmp_path)
    model = load_model(ModelConfig("hf", str(base)), torch.float32)
    path = tmp_path / "merged.gguf"
    write_gguf_model(model, tiny_tokenizer(), PromptLayout(stop_token_ids=[2]), path, "fp32", base, "small")
    assert content(path) == content(base)
    assert torch.equal(GGUFFile(path).read("rope_freqs.weight", torch.float32), divisors)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_positions_that_a_run_scales_are_not_those_of_its_base_file(kind: str, tmp_path: Path) -> None:
    base = written(case_model("llama"), tmp_path)
    scaling = RopeScaling(type=kind, factor=4.0)
    model = load_model(ModelConfig("hf", str(base), rope_scaling=scaling), torch.float32)
    path = tmp_path / "merged.gguf"
    write_gguf_model(model, tiny_tokenizer(), PromptLayout(stop_token_ids=[2]), path, "fp32", base, "small")
    fields = GGUFFile(path).fields
    assert (fields["llama.rope.scaling.type"], fields["llama.rope.scaling.factor"]) == (kind, 4.0)
    assert fields["tokenizer.ggml.tokens"] == GGUFFile(base).fields["tokenizer.ggml.tokens"]
    read = load_model(ModelConfig("hf", str(path)), torch.float32)
    torch.testing.assert_close(read(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


OTHERWISE: dict[str, tuple[dict[str, Any], str]] = {
    "llama": ({"hidden_act": "gelu"}, "llama has no hidden_act='gelu', only 'silu'"),
    "qwen2": ({"rope_parameters": LLAMA_3}, "positions of qwen2 scaled by llama3 are not written here"),
    "qwen3": ({"attention_bias": True}, "qwen3 has no attention_bias=True, only False"),
    "qwen3_moe": ({"norm_topk_prob": False}, "qwen3moe has no norm_topk_prob=False, only True"),
    "gemma": ({"tie_word_embeddings": False}, "gemma takes its embedding for the head, and this model has one of its"),
    "gemma2": ({"final_logit_softcapping": None}, "gemma2 has no final_logit_softcapping=null"),
    "gemma3_text": ({"query_pre_attn_scalar": 8}, "gemma3 has no query_pre_attn_scalar=8, only 16"),
    "smollm3": ({"no_rope_layers": [1, 1, 1, 1, 1]}, "no no_rope_layers=[1, 1, 1, 1, 1], only [1, 1, 1, 0, 1]"),
    "granite": ({"hidden_act": "relu"}, "granite has no hidden_act='relu', only 'silu'"),
    "olmo2": ({"head_dim": 32}, "olmo2 has no head_dim=32 but hidden_size / num_attention_heads"),
    "cohere": ({"use_qk_norm": True}, "command-r has no use_qk_norm=True, only False"),
    "cohere2": ({"layer_types": [FULL] * 4}, "cohere2 has a window, and no layer of this model has one"),
    "gpt_oss": ({"swiglu_limit": 5.0}, "gpt-oss has no swiglu_limit=5.0, only 7.0"),
    "starcoder2": ({"use_bias": False}, "starcoder2 has no use_bias=False, only True"),
    "stablelm": ({"qk_layernorm": True}, "stablelm has no qk_layernorm=True, only False"),
    "olmo3": (
        {"rope_parameters": {**YARN_GLOBALLY, FULL: {**YARN, "attention_factor": 2.0}}},
        "positions scaled by yarn with attention_factor=2.0 are not written here",
    ),
    "olmo3 at two paces": (
        {"rope_parameters": {**YARN_GLOBALLY, FULL: {"rope_type": "default", "rope_theta": 5e5}}},
        "olmo2 turns positions at one pace in all layers, and this model has a rope_theta for each kind",
    ),
    "qwen2 with wide heads": ({"head_dim": 32}, "qwen2 has no head_dim=32 but hidden_size / num_attention_heads"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERWISE)
def test_what_llama_cpp_computes_otherwise_is_refused(case: str, tmp_path: Path) -> None:
    (options, message), family = OTHERWISE[case], case.split()[0]
    model = small_model(family, vocab_size=320, **{**OF_GGUF.get(family, {}), **options})
    with pytest.raises(GGUFModelError, match=re.escape(message)):
        written(model, tmp_path)
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize("family", [name for name, each in FAMILIES.items() if each.head == "own"])
def test_a_shared_head_has_a_tensor_where_llama_cpp_wants_one(family: str, tmp_path: Path) -> None:
    model = small_model(family, vocab_size=320, tie_word_embeddings=True, **OF_GGUF.get(family, {}))
    file = GGUFFile(written(model, tmp_path))
    assert torch.equal(file.read("output.weight", torch.float32), file.read("token_embd.weight", torch.float32))


@pytest.mark.parametrize("dtype", ["bf16", "q8_0"])
def test_routers_and_norms_of_heads_stay_fp32(dtype: str, tmp_path: Path) -> None:
    model = small_model("gpt_oss", vocab_size=320, **OF_GGUF.get("gpt_oss", {}))
    path = tmp_path / "model.gguf"
    write_gguf_model(model, tiny_tokenizer(), PromptLayout(), path, dtype, None, "small")
    kinds = {tensor.name.split(".", 2)[-1]: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["ffn_gate_inp.weight"] == kinds["ffn_up_exps.bias"] == kinds["attn_sinks.weight"] == "F32"
    assert kinds["ffn_gate_exps.weight"] == kinds["ffn_down_exps.weight"] == {"bf16": "BF16", "q8_0": "Q8_0"}[dtype]


def test_the_text_of_a_model_that_sees_is_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = small_model("gemma3_text", vocab_size=320, **OF_GGUF["gemma3_text"]).config
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = Gemma3Config(text_config=text.to_dict(), vision_config=vision.to_dict(), mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "model")
    trained = load_model(ModelConfig("hf", str(tmp_path / "model")), torch.float32)
    read = load_model(ModelConfig("hf", str(written(trained, tmp_path))), torch.float32)
    assert torch.equal(read(IDS).logits, model(IDS).logits)
    assert "the file is of text alone: 2 weights of what sees or hears are left out" in caplog.text
