"""Published low-bit checkpoints are held as they are, and stand for the weights that their writers meant."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import small_model
from published_checkpoints import PUBLISHED, fp8, mxfp4, publish, publish_experts, publish_mxfp4
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_peft.adapters.inject import inject_adapters
from lightning_peft.adapters.lora import LoRAConfig
from lightning_peft.kernels.codes import Codes, dequantize
from lightning_peft.models.loading import load_model
from lightning_peft.models.source import ModelConfig
from lightning_peft.quantization.experts import QuantizedExperts
from lightning_peft.quantization.linear import CodedWeight, QuantizedLinear
from lightning_peft.quantization.published.fp8 import FP8
from lightning_peft.quantization.published.mxfp4 import MXFP4
from lightning_peft.quantization.quantize import bits_per_parameter


def logits(model: Any) -> Tensor:
    ids = torch.randint(3, 90, (2, 13), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_layer_is_the_weight_its_writer_meant(name: str, tmp_path: Path) -> None:
    meant = publish(small_model("llama"), tmp_path / "low", PUBLISHED[name], tmp_path / "dense")
    model = load_model(ModelConfig("hf", str(tmp_path / "low")), torch.float32)
    coded = {n: layer for n, layer in model.named_modules() if isinstance(layer, CodedWeight)}
    assert coded.keys() == {weight.removesuffix(".weight") for weight in meant}
    for layer_name, layer in coded.items():
        assert torch.equal(layer.dequantize(torch.float32), meant[f"{layer_name}.weight"]), layer_name
        assert torch.equal(layer.dequantize(torch.bfloat16), meant[f"{layer_name}.weight"].bfloat16())
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(dense), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["fp8_blocks", "fp8_128", "fp8_tensor", "gptq", "awq", "packed_int4"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_experts_published_one_by_one_are_stacked_in_their_codes(family: str, name: str, tmp_path: Path) -> None:
    publish_experts(small_model(family), tmp_path / "low", PUBLISHED[name], tmp_path / "dense")
    model = load_model(ModelConfig("hf", str(tmp_path / "low"), attention="eager"), torch.float32)
    stacks = [layer for layer in model.modules() if isinstance(layer, QuantizedExperts)]
    assert len(stacks) == 2 * sum("experts.gate_up_proj" in n for n, m in model.named_modules() if m in stacks)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32, attn_implementation="eager")
    for layer_name, layer in model.named_modules():
        if isinstance(layer, QuantizedExperts):
            assert torch.equal(layer.dequantize(torch.float32), dense.get_parameter(layer_name))
        elif isinstance(layer, QuantizedLinear):
            assert torch.equal(layer.dequantize(torch.float32), dense.get_parameter(f"{layer_name}.weight"))
    torch.testing.assert_close(logits(model), logits(dense), rtol=0, atol=1e-5)


def test_mxfp4_experts_are_held_as_published(tmp_path: Path) -> None:
    meant = publish_mxfp4(small_model("gpt_oss"), tmp_path / "low", tmp_path / "dense")
    model = load_model(ModelConfig("hf", str(tmp_path / "low"), attention="eager"), torch.float32)
    assert bits_per_parameter(model) == 4.25
    for name, stack in meant.items():
        assert torch.equal(model.get_submodule(name).dequantize(torch.float32), stack)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32, attn_implementation="eager")
    torch.testing.assert_close(logits(model), logits(dense), rtol=0, atol=1e-5)


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    stack = torch.randn(3, 8, 64, generator=torch.Generator().manual_seed(1))
    parts, dense = mxfp4(stack)
    weight = MXFP4({}).read("experts.down_proj", parts)
    theirs = convert_moe_packed_tensors(parts["_blocks"], parts["_scales"])  # (experts, in, out), as GPT-OSS has it
    for expert in range(3):
        one = Codes(*(None if part is None else part[expert] for part in weight.codes))
        ours = dequantize(one, weight.kind, weight.block_size, torch.bfloat16)
        assert torch.equal(ours, theirs[expert].t()) and torch.equal(ours, dense[expert].bfloat16())


def test_fp8_is_what_transformers_makes_of_it() -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    parts, _ = fp8(torch.randn(96, 64, generator=torch.Generator().manual_seed(1)), (32, 32))
    weight = FP8({"weight_block_size": [32, 32]}).read(
        "q_proj", {"": parts[".weight"], "_scale_inv": parts[".weight_scale_inv"]}
    )
    theirs = Fp8Dequantize(None)._dequantize_one(parts[".weight"], parts[".weight_scale_inv"], torch.bfloat16)
    assert torch.equal(dequantize(weight.codes, weight.kind, weight.block_size, torch.bfloat16), theirs)


@pytest.mark.parametrize("name", ["mxfp4", "fp8_128", "awq"])
def test_adapters_of_coded_experts_have_the_gradients_of_dense_ones(name: str, tmp_path: Path) -> None:
    if name == "mxfp4":
        publish_mxfp4(small_model("gpt_oss"), tmp_path / "low", tmp_path / "dense")
    else:
        publish_experts(small_model("qwen3_moe"), tmp_path / "low", PUBLISHED[name], tmp_path / "dense")
    gradients = []
    for folder in ("low", "dense"):
        model = load_model(ModelConfig("hf", str(tmp_path / folder), attention="eager"), torch.float32)
        torch.manual_seed(0)
        inject_adapters(model, LoRAConfig(rank=4, experts=2))
        generator = torch.Generator().manual_seed(2)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        for parameter in trained.values():
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        ids = torch.randint(3, 90, (2, 13), generator=torch.Generator().manual_seed(3))
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in trained.items()})
    assert any(".experts." in name for name in gradients[1]) and gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-4, atol=1e-6)
