"""Stacked experts in codes: each expert as a linear layer of its own would be, and computed as its dense weight."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import small_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lightning_peft.adapters.inject import adapters, inject_adapters
from lightning_peft.adapters.lora import LoRAConfig, LoRAExperts
from lightning_peft.adapters.merge import merge_adapters
from lightning_peft.models.loading import load_model
from lightning_peft.models.source import ModelConfig
from lightning_peft.models.tiny import tiny_tokenizer
from lightning_peft.quantization.config import Kind, QuantizationConfig
from lightning_peft.quantization.experts import QuantizedExperts, close_experts
from lightning_peft.quantization.linear import CodedWeight, QuantizedLinear
from lightning_peft.quantization.quantize import (
    bits_per_parameter,
    dequantized_layer,
    quantize_linears,
    weights_fingerprint,
)

pytestmark = pytest.mark.filterwarnings("ignore")
CONFIGS = {
    "nf4": QuantizationConfig(kind=Kind.nf4, block_size=32),
    "fp4_once": QuantizationConfig(kind=Kind.fp4, block_size=32, double_quantization=False),
    "int8": QuantizationConfig(kind=Kind.int8, double_quantization=False),
}
FAMILIES = ["qwen3_moe", "gpt_oss", "llama4_text"]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(3, 90, (2, 13), generator=torch.Generator().manual_seed(3))
    return model(ids, use_cache=False).logits


def dense_again(model: Any) -> Any:
    """Return the plain model with the weights that the codes stand for."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, CodedWeight):
            model.set_submodule(name, dequantized_layer(layer))
    close_experts(model)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_has_the_codes_of_a_linear_layer(family: str) -> None:
    model, config = small_model(family), CONFIGS["nf4"]
    dense = {name: weight.clone() for name, weight in model.state_dict().items()}
    quantize_linears(model, config)
    stacks = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedExperts)}
    assert stacks
    for name, layer in stacks.items():
        weight = dense[name].mT if layer.transposed else dense[name]
        for expert, matrix in enumerate(weight):
            alone = QuantizedLinear.from_weight(matrix.contiguous(), None, "nf4", config.block_size)
            for got, expected in zip(layer.codes, alone.codes, strict=True):
                assert torch.equal(got[expert], expected)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_dequantised_model(family: str, config: str) -> None:
    model = small_model(family)
    names = quantize_linears(model, CONFIGS[config])
    assert any(name.endswith("experts.down_proj") for name in names)
    coded = logits(model)
    dense = dense_again(model)
    assert set(dense.state_dict()) == set(small_model(family).state_dict())
    # fp32: the same products, summed in another order.
    torch.testing.assert_close(coded, logits(dense), rtol=0, atol=1e-5 * float(coded.abs().max()))


def adapted(family: str, coded: bool) -> Any:
    model = small_model(family)
    quantize_linears(model, CONFIGS["nf4"])
    if not coded:
        dense_again(model)
    torch.manual_seed(1)
    inject_adapters(model, LoRAConfig(rank=4, experts=2))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_on_the_dequantised_model(family: str) -> None:
    gradients = []
    for coded in (True, False):
        model = adapted(family, coded)
        kinds = {type(layer.base_layer) for _, layer in adapters(model) if isinstance(layer, LoRAExperts)}
        assert (kinds == {QuantizedExperts}) is coded
        ids = torch.randint(3, 90, (2, 13), generator=torch.Generator().manual_seed(3))
        model(ids, use_cache=False).logits.square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, expected in gradients[1].items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(gradients[0][name], expected, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("family", FAMILIES)
def test_merge_adds_to_what_the_codes_stand_for(family: str) -> None:
    model = adapted(family, coded=True)
    before = weights_fingerprint(model)
    expected = logits(model)
    assert weights_fingerprint(model) == before
    merged = merge_adapters(model)
    assert not any(isinstance(module, CodedWeight) for module in merged.modules())
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_experts_are_quantised_as_loaded_ones(family: str, tmp_path: Path) -> None:
    small_model(family).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    streamed = load_model(ModelConfig("hf", str(tmp_path)), torch.float32, CONFIGS["nf4"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    quantize_linears(loaded, CONFIGS["nf4"])
    assert weights_fingerprint(streamed) == weights_fingerprint(loaded)
    torch.testing.assert_close(logits(streamed), logits(loaded), rtol=0, atol=1e-5)
    assert 4.25 < bits_per_parameter(streamed) < 4.5  # a code, 8 bits of a maximum for 32 of them, and its fp32 scale


def test_blocks_that_do_not_fit_name_the_stack() -> None:
    with pytest.raises(ValueError, match="experts.down_proj in_features 96 is no multiple of block size 64"):
        quantize_linears(small_model("mixtral"), QuantizationConfig(kind=Kind.nf4))


def test_experts_of_another_computation_are_refused() -> None:
    with pytest.raises(ValueError, match="holds its experts in one 3-D parameter"):
        quantize_linears(small_model("jetmoe"), CONFIGS["nf4"])
