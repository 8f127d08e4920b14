import gc
import weakref

import pytest
import torch
from families import small_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from lightning_peft.models.tiny import tiny_config, tiny_model
from lightning_peft.quantization.config import Kind, QuantizationConfig
from lightning_peft.quantization.linear import QuantizedLinear
from lightning_peft.quantization.quantize import (
    bits_per_parameter,
    dequantized_layer,
    dequantized_linear,
    load_weight,
    memory_by_group,
    prepare_quantized,
    quantize_linears,
    weights_fingerprint,
)

NF4 = QuantizationConfig(kind=Kind.nf4)
LINEARS_PER_BLOCK = 7


def test_linears_are_quantised_and_the_rest_is_not():
    model = tiny_model()
    names = quantize_linears(model, NF4)
    assert len(names) == 2 * LINEARS_PER_BLOCK
    assert all(isinstance(model.get_submodule(name), QuantizedLinear) for name in names)
    assert type(model.lm_head) is nn.Linear
    assert type(model.model.embed_tokens) is nn.Embedding


def test_quantised_model_computes_with_the_dequantised_weights():
    model, dense = tiny_model(), tiny_model()
    for name in quantize_linears(model, NF4):
        dense.set_submodule(name, dequantized_linear(model.get_submodule(name)))
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(model(ids).logits, dense(ids).logits)


def test_dense_weights_are_freed():
    model = tiny_model()
    weights = [weakref.ref(module.weight) for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
    quantize_linears(model, NF4)
    gc.collect()
    assert len(weights) == 2 * LINEARS_PER_BLOCK
    assert all(weight() is None for weight in weights)


def test_streaming_into_a_meta_model_equals_quantising_at_once():
    expected = tiny_model()
    source = {name: tensor.clone() for name, tensor in expected.state_dict().items()}
    quantize_linears(expected, NF4)
    with torch.device("meta"):
        model = type(expected)(tiny_config())
    names = prepare_quantized(model, NF4)
    streamed = [name for name, tensor in source.items() if load_weight(model, name, tensor)]
    assert streamed == [f"{name}.weight" for name in names]
    for name in names:
        ours, theirs = model.get_submodule(name).codes, expected.get_submodule(name).codes
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_excluded_layers_stay_dense():
    model = tiny_model()
    names = quantize_linears(model, QuantizationConfig(kind=Kind.nf4, exclude=["model.layers.0.*", "down_proj"]))
    assert names == [f"model.layers.1.{part}" for part in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    )]  # fmt: skip


def test_a_layer_to_whose_dtype_the_model_casts_stays_dense():
    """The indexer of DeepSeek V3.2 casts activations to the dtype of a weight: that of codes makes them integers."""
    sizes = {"num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "v_head_dim": 16, "qk_nope_head_dim": 16}
    sizes |= {"qk_rope_head_dim": 16, "index_topk": 4, "index_head_dim": 32, "index_n_heads": 32}
    model, dense = small_model("deepseek_v32", **sizes), small_model("deepseek_v32", **sizes)
    for name in [quantize_linears(m, QuantizationConfig(kind=Kind.nf4, block_size=32)) for m in (model, dense)][1]:
        dense.set_submodule(name, dequantized_layer(dense.get_submodule(name)))
    ids = torch.arange(3, 33)[None]
    assert type(model.model.layers[0].self_attn.indexer.weights_proj) is nn.Linear
    with torch.no_grad():
        got, expected = model(ids, use_cache=False).logits, dense(ids, use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))  # fp32, other kernels


def test_unknown_exclusion_is_an_error():
    with pytest.raises(ValueError, match=r"quantization.exclude=\['gate_projj'\]: matches no module"):
        quantize_linears(tiny_model(), QuantizationConfig(kind=Kind.nf4, exclude=["gate_projj"]))


def test_bias_is_kept():
    model = nn.Sequential(nn.Linear(64, 8))
    bias = model[0].bias
    quantize_linears(model, NF4)
    assert model[0].bias is bias


def test_gpt2_has_the_codes_of_its_transposed_weights():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=32))
    weight = model.transformer.h[0].attn.c_attn.weight.detach().clone()
    quantize_linears(model, NF4)
    layer = model.transformer.h[0].attn.c_attn
    assert torch.equal(layer.dequantize(), QuantizedLinear.from_weight(weight.t().contiguous()).dequantize())
    assert torch.equal(dequantized_linear(layer).weight, layer.dequantize().t())


def test_excluded_experts_stay_dense():
    config = MixtralConfig(
        vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    names = quantize_linears(MixtralForCausalLM(config), QuantizationConfig(kind=Kind.nf4, exclude=["experts"]))
    assert [name.rpartition(".")[2] for name in names] == attention
    names = quantize_linears(MixtralForCausalLM(config), NF4)
    assert [name.rpartition(".")[2] for name in names] == [*attention, "gate_up_proj", "down_proj"]


def test_narrow_layer_is_refused_before_any_is_touched():
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(48, 8))
    with pytest.raises(ValueError, match="nf4: 1 in_features 48 is no multiple of block size 64"):
        quantize_linears(model, NF4)
    assert type(model[0]) is nn.Linear


def test_fingerprint_outlives_casts_wrappers_and_reloading():
    model = tiny_model()
    quantize_linears(model, NF4)
    before = weights_fingerprint(model)
    state = model.state_dict()
    assert weights_fingerprint(model.to(torch.bfloat16)) == before
    other = tiny_model(seed=1)
    quantize_linears(other, NF4)
    assert weights_fingerprint(other) != before
    other.load_state_dict(state)
    wrapper = nn.Module()
    wrapper.base_layer = other.model.layers[0].mlp.gate_proj
    other.model.layers[0].mlp.gate_proj = wrapper
    assert weights_fingerprint(other) == before


def test_fingerprint_sees_one_changed_code():
    model = tiny_model()
    quantize_linears(model, NF4)
    before = weights_fingerprint(model)
    model.model.layers[1].mlp.down_proj.weight[0, 0] ^= 1
    assert weights_fingerprint(model) != before


def test_memory_by_group_adds_up_to_the_formula():
    model = tiny_model().requires_grad_(False)
    quantize_linears(model, NF4)
    model.model.norm.weight.requires_grad_()
    hidden, inner, key_value, vocabulary = 64, 128, 32, 320
    linear = 2 * (2 * hidden * hidden + 2 * hidden * key_value + 3 * hidden * inner)
    groups = memory_by_group(model)
    assert groups["codes"] == linear // 2
    # A byte for each 64 weights; for each of the 14 layers at most 128 such bytes: one fp32 maximum and one offset.
    assert groups["scales"] == linear // 64 + 2 * LINEARS_PER_BLOCK * 8
    assert groups["embeddings"] == 2 * vocabulary * hidden * 4
    assert groups["trainable"] == hidden * 4
    rotary = sum(buffer.nbytes for buffer in model.buffers() if buffer.shape == (8,))
    assert groups["other"] == 2 * 2 * hidden * 4 + rotary
    assert bits_per_parameter(model) == 8 * (groups["codes"] + groups["scales"]) / linear


def test_tied_embeddings_count_once():
    model = tiny_model(tied=True).requires_grad_(False)
    assert memory_by_group(model)["embeddings"] == 320 * 64 * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 48}, "quantization.block_size=48: must be a power of two from 32 to 4096"),
        ({"kind": Kind.int8}, "quantization.block_size=64 double_quantization=True: kind=int8 has one fp32 scale"),
    ],
)
def test_config_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        QuantizationConfig(**options)


def test_kind_none_quantises_nothing():
    assert not QuantizationConfig().is_on
    with pytest.raises(ValueError, match="quantization.kind=none"):
        quantize_linears(tiny_model(), QuantizationConfig())
