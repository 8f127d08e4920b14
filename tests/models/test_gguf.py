import logging
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from families import small_model
from gguf import GGMLQuantizationType, GGUFWriter
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Lfm2Config, PreTrainedModel

from lightning_peft.models.gguf import open_gguf
from lightning_peft.models.gguf_fields import check_fields
from lightning_peft.models.loading import load_model, load_tokenizer, model_config, model_context
from lightning_peft.models.source import ModelConfig, locate
from lightning_peft.models.stored import source_fingerprint

IDS = torch.arange(3, 35)[None]


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    kind: GGMLQuantizationType,
    scaling: Callable[[GGUFWriter], None] | None = None,
    heads_of_blocks: list[int] | None = None,
    **more: np.ndarray,
) -> None:
    """Write the model as llama.cpp would store it: rotary pairs of llama's q and k side by side, matrices quantised."""
    config, architecture = model.config, model.config.model_type
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    if heads_of_blocks is None:
        writer.add_head_count(config.num_attention_heads)
    elif heads_of_blocks:
        writer.add_array(f"{architecture}.attention.head_count", heads_of_blocks)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(16)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        module = name.split(".")[-2]
        if architecture == "llama" and module in heads:
            tensor = tensor.reshape(heads[module], 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        stored = GGMLQuantizationType.F32 if tensor.ndim == 1 else kind
        data = gguf.quants.quantize(tensor.numpy(), stored)
        raw_dtype = stored if stored == GGMLQuantizationType.BF16 or data.dtype == np.uint8 else None
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), data, raw_dtype=raw_dtype)
    for name, values in more.items():
        writer.add_tensor(name.replace("__", "."), values)
    if scaling is not None:
        scaling(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_gguf_equals_its_model(model_type: str, kind: str, tmp_path: Path) -> None:
    original = small_model(model_type, use_sliding_window=False)
    stored_as = GGMLQuantizationType[kind]
    write_gguf(tmp_path / "model.gguf", original, stored_as)
    config = ModelConfig("hf", str(tmp_path / "model.gguf"), attention="sdpa")
    model = load_model(config, torch.float32)
    with torch.no_grad():
        for parameter in original.parameters():
            if parameter.ndim == 2:
                # The type keeps these bits of the weight; rows permute, so quantising here or there is the same.
                packed = gguf.quants.quantize(parameter.numpy(), stored_as)
                parameter.copy_(torch.from_numpy(gguf.quants.dequantize(packed, stored_as)))
    assert torch.equal(model(IDS).logits, original(IDS).logits)
    assert model_context(config) == 64


def write_gpt2(path: Path, original: PreTrainedModel, lacking: str = "") -> None:
    """Write a file of a family that transformers reads, but for one tensor."""
    writer = GGUFWriter(path, "gpt2")
    writer.add_context_length(64)
    writer.add_block_count(2)
    writer.add_embedding_length(64)
    writer.add_head_count(4)
    writer.add_layer_norm_eps(1e-5)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, 2)
    for name, tensor in original.state_dict().items():
        data = tensor.t() if ".attn.c" in name or ".mlp.c" in name else tensor
        key = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if name != "lm_head.weight" and key != lacking:
            writer.add_tensor(key, np.ascontiguousarray(data.numpy()))
    writer.add_token_list([str(i) for i in range(96)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def small_gpt2() -> PreTrainedModel:
    return small_model("gpt2", max_position_embeddings=1024, n_positions=1024, n_inner=256)


def test_unknown_tensor_leaves_the_file_to_transformers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    original = small_gpt2()
    write_gpt2(tmp_path / "model.gguf", original)
    with caplog.at_level(logging.INFO):
        model = load_model(ModelConfig("hf", str(tmp_path / "model.gguf")), torch.float32)
    assert "read by transformers" in caplog.text
    torch.testing.assert_close(model(IDS).logits, original(IDS).logits, atol=1e-5, rtol=1e-5)


def test_a_tensor_that_transformers_would_draw_at_random_is_refused(tmp_path: Path) -> None:
    write_gpt2(tmp_path / "m.gguf", small_gpt2(), lacking="blk.1.ffn_up.weight")
    with pytest.raises(ValueError, match="lacks 1 weights of GPT2LMHeadModel, such as transformer.h.1.mlp.c_fc"):
        loaded(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"GGML" + bytes(40), "does not start with GGUF"), (b"GGUF" + bytes(40), "version 0"), (b"", "cannot be read")],
)
def test_wrong_file_is_one_sentence(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(ModelConfig("hf", str(tmp_path / "model.gguf")))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_truncated_file_is_one_sentence(share: float, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, small_model("llama"), GGMLQuantizationType.F32)
    data = path.read_bytes()
    path.write_bytes(data[: 100 if share < 0.5 else int(len(data) * share)])
    with pytest.raises(ValueError, match="truncated"):
        load_model(ModelConfig("hf", str(path)), torch.float32)


TEXTS = [
    "Hello world 123 4567 it's\n\n  def f(x):\n\treturn x + 1  ",
    "héllo 東京 <|im_end|> ñ 3.14 don't WE'LL  'tis",
    "<|im_start|>user\nSELECT * FROM t WHERE a >= 10;<|im_end|>",
    "a  b   c\r\n",
]


def test_embedded_model_reads_fast_and_whole() -> None:
    config = ModelConfig()
    model, tokenizer = load_model(config, torch.bfloat16), load_tokenizer(config)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight and model_context(config) == 8192
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, return_tensors="pt")
    answer = model.generate(prompt, max_new_tokens=7, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt.shape[1] :])
    assert len(source_fingerprint(config)) == 64
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.slow
def test_embedded_model_equals_transformers() -> None:
    config = ModelConfig(attention="sdpa")
    file = locate(config)
    theirs = AutoConfig.from_pretrained(file.parent, gguf_file=file.name).to_dict()
    ours = model_config(config).to_dict()
    assert {k: v for k, v in ours.items() if v != theirs.get(k)} == {"_name_or_path": ""}
    expected = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model = load_model(config, torch.float32)
    tokenizer, reference = load_tokenizer(config), AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token, tokenizer.chat_template) == (
        reference.eos_token, reference.pad_token, reference.bos_token, reference.chat_template,
    )  # fmt: skip
    for text in TEXTS:
        ids = reference(text)["input_ids"]
        assert tokenizer(text)["input_ids"] == ids
        assert torch.equal(model(torch.tensor([ids])).logits, expected(torch.tensor([ids])).logits)


def scaled_llama(**parameters: object) -> PreTrainedModel:
    return small_model("llama", rope_parameters={"rope_theta": 10000.0, **parameters}, max_position_embeddings=512)


def difference(model: PreTrainedModel, other: PreTrainedModel) -> float:
    ids = torch.randint(3, 90, (1, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return float((model(ids).logits - other(ids).logits).abs().max())


def loaded(path: Path) -> PreTrainedModel:
    return load_model(ModelConfig("hf", str(path), attention="sdpa"), torch.float32)


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
UNLIKE = np.linspace(1, 7, 8, dtype=np.float32)


def llama3_factors() -> np.ndarray:
    """Return the factors as llama.cpp's converter writes them."""
    factors = []
    for frequency in 10000.0 ** -(np.arange(0, 16, 2) / 16):
        wavelength = 2 * np.pi / frequency
        smooth = (64 / wavelength - 1) / (4 - 1)
        between = 1 / ((1 - smooth) / 8 + smooth)
        factors.append(1 if wavelength < 64 / 4 else 8 if wavelength > 64 else between)
    return np.array(factors, dtype=np.float32)


def test_llama3_factors_are_read(tmp_path: Path) -> None:
    original = scaled_llama(**LLAMA3)
    write_gguf(tmp_path / "m.gguf", original, GGMLQuantizationType.F32, rope_freqs__weight=llama3_factors())
    model = loaded(tmp_path / "m.gguf")
    assert model.config.rope_parameters == original.config.rope_parameters
    assert difference(model, original) < 1e-4 < difference(model, scaled_llama(rope_type="default"))


def test_other_factors_of_frequencies_are_read(tmp_path: Path) -> None:
    original = scaled_llama(rope_type="default")
    rope = original.model.rotary_emb
    rope.inv_freq = rope.inv_freq / torch.from_numpy(UNLIKE)
    write_gguf(tmp_path / "m.gguf", original, GGMLQuantizationType.F32, rope_freqs__weight=UNLIKE)
    assert difference(loaded(tmp_path / "m.gguf"), original) < 1e-4


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_scaled_positions_are_read(kind: str, tmp_path: Path) -> None:
    more = {"original_max_position_embeddings": 128} if kind == "yarn" else {}
    original = scaled_llama(rope_type=kind, factor=4.0, **more)

    def scaling(writer: GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType[kind.upper()])
        writer.add_rope_scaling_factor(4.0)
        if more:
            writer.add_rope_scaling_orig_ctx_len(128)

    write_gguf(tmp_path / "m.gguf", original, GGMLQuantizationType.F32, scaling)
    model = loaded(tmp_path / "m.gguf")
    assert difference(model, original) < 1e-4 < difference(model, scaled_llama(rope_type="default"))


@pytest.mark.parametrize("key", ["scaling.factor", "scale_linear"])
def test_a_factor_without_a_type_is_linear_as_in_llama_cpp(key: str, tmp_path: Path) -> None:
    original = scaled_llama(rope_type="linear", factor=4.0)
    path = tmp_path / "m.gguf"
    write_gguf(path, original, GGMLQuantizationType.F32, lambda w: w.add_float32(f"llama.rope.{key}", 4.0))
    model = loaded(path)
    assert difference(model, original) < 1e-4 < difference(model, scaled_llama(rope_type="default"))
    write_gguf(path, original, GGMLQuantizationType.F32, lambda w: w.add_float32(f"llama.rope.{key}", 0.0))
    assert difference(loaded(path), scaled_llama(rope_type="default")) < 1e-4


def test_a_factor_of_positions_that_transformers_passes_over_is_refused(tmp_path: Path) -> None:
    def add(writer: GGUFWriter) -> None:
        writer.add_float32("llama.rope.scale_linear", 4.0)

    write_gguf(tmp_path / "m.gguf", small_model("llama"), GGMLQuantizationType.F32, add, extra__weight=UNLIKE)
    with pytest.raises(ValueError, match="transformers does not read its linear scaling of positions; use the model's"):
        loaded(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("blocks", "head_dim", "told"), [(46, 128, "root of 144, and of 256"), (42, 256, ""), (26, 128, "root of 128")]
)
def test_scores_of_gemma_are_divided_as_in_llama_cpp_or_refused(blocks: int, head_dim: int, told: str) -> None:
    file: Any = SimpleNamespace(
        fields={"general.architecture": "gemma2", "gemma2.block_count": blocks}, path="m.gguf"
    )  # which no field says
    config = Gemma2Config(num_hidden_layers=blocks, head_dim=head_dim, hidden_size=4608, num_attention_heads=32)
    with pytest.raises(ValueError, match=f"its scores are divided by the {told}") if told else nullcontext():
        check_fields(file, config)


def test_biases_of_llama_are_read(tmp_path: Path) -> None:
    original = small_model("llama", attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for name, parameter in original.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
    write_gguf(tmp_path / "m.gguf", original, GGMLQuantizationType.F32)
    model = loaded(tmp_path / "m.gguf")
    torch.testing.assert_close(model(IDS).logits, original(IDS).logits, rtol=1e-5, atol=1e-5)


def filled_biases(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
    return model


def test_biases_of_qwen3_are_read(tmp_path: Path) -> None:
    original = filled_biases(small_model("qwen3", attention_bias=True, use_sliding_window=False))
    write_gguf(tmp_path / "m.gguf", original, GGMLQuantizationType.F32)
    torch.testing.assert_close(loaded(tmp_path / "m.gguf")(IDS).logits, original(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tensor", ["blk.1.attn_output.bias", "blk.0.ffn_down.bias", "blk.0.attn_q_norm.weight"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_tensor_without_a_place_is_refused(family: str, tensor: str, tmp_path: Path) -> None:
    more = {tensor.replace(".", "__"): np.ones(64, np.float32)}
    write_gguf(tmp_path / "m.gguf", small_model(family), GGMLQuantizationType.F32, **more)
    with pytest.raises(ValueError, match=f"(no place for|not read) 1 of its tensors, such as {tensor}: use"):
        loaded(tmp_path / "m.gguf")


def test_bounds_of_yarn_are_read(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    original = scaled_llama(**yarn, beta_fast=2.0, beta_slow=0.2)

    def scaling(writer: GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(128)
        writer.add_rope_scaling_yarn_beta_fast(2.0)
        writer.add_rope_scaling_yarn_beta_slow(0.2)

    write_gguf(tmp_path / "m.gguf", original, GGMLQuantizationType.F32, scaling)
    model = loaded(tmp_path / "m.gguf")
    assert difference(model, original) < 1e-4 < difference(model, scaled_llama(**yarn))


FIELDS: dict[str, tuple[Callable[[GGUFWriter], None], str]] = {
    "partial rotation": (lambda w: w.add_rope_dimension_count(8), "rope.dimension_count=8 is 16 for transformers"),
    "other values": (lambda w: w.add_value_length(32), "attention.value_length=32 is 16 for transformers"),
    "logit scale": (lambda w: w.add_logit_scale(0.25), "logit_scale=0.25 is not read"),
    "softcap": (lambda w: w.add_final_logit_softcapping(30.0), "final_logit_softcapping=30 is not read"),
    "embedding scale": (lambda w: w.add_embedding_scale(12.0), "embedding_scale=12 is not read"),
    "window": (lambda w: w.add_sliding_window(8), "attention.sliding_window=8 is not read"),
    "all see all": (lambda w: w.add_causal_attention(False), "attention.causal=False is True for transformers"),
    "yarn's factor": (lambda w: w.add_rope_scaling_attn_factors(1.5), "rope.scaling.attn_factor=1.5 is not read"),
    "a part": (lambda w: w.add_uint16("split.count", 3), "is one of 3 parts of a model; put them together"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_that_is_not_read_is_refused(name: str, tmp_path: Path) -> None:
    add, message = FIELDS[name]
    write_gguf(tmp_path / "m.gguf", small_model("llama"), GGMLQuantizationType.F32, add)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        loaded(tmp_path / "m.gguf")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_fields_that_change_nothing_are_passed_over(tmp_path: Path) -> None:
    def add(writer: GGUFWriter) -> None:
        writer.add_rope_dimension_count(16)
        writer.add_value_length(16)
        writer.add_logit_scale(1.0)
        writer.add_expert_count(0)
        writer.add_sliding_window(0)
        writer.add_causal_attention(True)
        writer.add_rope_scaling_finetuned(True)
        writer.add_tensor_data_layout("Meta AI original pth")

    original = small_model("llama")
    write_gguf(tmp_path / "m.gguf", original, GGMLQuantizationType.F32, add)
    torch.testing.assert_close(loaded(tmp_path / "m.gguf")(IDS).logits, original(IDS).logits, rtol=1e-5, atol=1e-5)


def test_a_window_counts_from_the_context_down(tmp_path: Path) -> None:
    original = small_model("llama")
    context = original.config.max_position_embeddings
    write_gguf(tmp_path / "m.gguf", original, GGMLQuantizationType.F32, lambda w: w.add_sliding_window(context))
    torch.testing.assert_close(loaded(tmp_path / "m.gguf")(IDS).logits, original(IDS).logits, rtol=1e-5, atol=1e-5)
    write_gguf(tmp_path / "m.gguf", original, GGMLQuantizationType.F32, lambda w: w.add_sliding_window(context - 1))
    with pytest.raises(ValueError, match=f"attention.sliding_window={context - 1} is not read"):
        loaded(tmp_path / "m.gguf")


@pytest.mark.parametrize(("heads", "is_read"), [([0, 8, 0, 8], True), ([0, 8, 0, 4], False), (8, True)])
def test_layers_without_attention_have_no_heads(heads: Any, is_read: bool) -> None:
    fields = {"general.architecture": "lfm2", "lfm2.attention.head_count_kv": heads}
    file: Any = SimpleNamespace(fields=fields, path="m.gguf")
    with nullcontext() if is_read else pytest.raises(ValueError, match="attention.head_count_kv="):
        check_fields(file, Lfm2Config(num_hidden_layers=4, num_key_value_heads=8))


def test_what_transformers_would_pass_over_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", small_model("llama"), GGMLQuantizationType.F32, extra__weight=UNLIKE)
    with pytest.raises(ValueError, match="does not read 1 of its tensors, such as extra.weight"):
        loaded(tmp_path / "m.gguf")


def test_fields_for_each_block_are_one_where_they_agree(tmp_path: Path) -> None:
    original, path = small_model("llama"), tmp_path / "m.gguf"
    write_gguf(path, original, GGMLQuantizationType.F32, heads_of_blocks=[4, 4])
    assert torch.equal(loaded(path)(IDS).logits, original(IDS).logits)
    write_gguf(path, original, GGMLQuantizationType.F32, heads_of_blocks=[4, 2])
    with pytest.raises(ValueError, match=r"llama.attention.head_count=\[4, 2\] differs by block, which transformers"):
        loaded(path)
    write_gguf(path, original, GGMLQuantizationType.F32, heads_of_blocks=[])
    with pytest.raises(ValueError, match="has no llama.attention.head_count; fetch the file again"):
        loaded(path)


def test_yarn_starts_from_the_context_where_no_other_is_said(tmp_path: Path) -> None:
    original = scaled_llama(rope_type="yarn", factor=4.0, original_max_position_embeddings=512)

    def scaling(writer: GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)

    write_gguf(tmp_path / "m.gguf", original, GGMLQuantizationType.F32, scaling)
    model = loaded(tmp_path / "m.gguf")
    assert difference(model, original) < 1e-4 < difference(model, scaled_llama(rope_type="default"))


OTHER_FILES: dict[str, tuple[Callable[[GGUFWriter], None], dict[str, np.ndarray], str]] = {
    "an adapter": (lambda w: w.add_type("adapter"), {}, "holds no model but what it calls adapter; give the file"),
    "too few factors": (lambda w: None, {"rope_freqs__weight": UNLIKE[:5]}, "has 5 factors, and heads of 16 need 8"),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_a_file_that_is_no_model_is_refused(name: str, tmp_path: Path) -> None:
    add, tensors, message = OTHER_FILES[name]
    write_gguf(tmp_path / "m.gguf", small_model("llama"), GGMLQuantizationType.F32, add, **tensors)
    with pytest.raises(ValueError, match=message):
        loaded(tmp_path / "m.gguf")


def test_a_family_that_transformers_does_not_read_is_one_sentence(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "m.gguf", "plamo2")
    writer.add_block_count(2)
    writer.add_tensor("token_embd.weight", np.ones((96, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"makes no model of its metadata, so give the model's safetensors files \("):
        loaded(tmp_path / "m.gguf")


def test_a_header_is_read_again_only_where_the_file_has_changed(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, small_model("llama"), GGMLQuantizationType.F32)
    file = open_gguf(path)
    assert open_gguf(path).fields is file.fields
    write_gguf(path, small_model("llama", num_hidden_layers=1), GGMLQuantizationType.F32)
    assert len(open_gguf(path).tensors) < len(file.tensors)
    path.write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=f"{path}: truncated or corrupt GGUF file"):
        open_gguf(path)
