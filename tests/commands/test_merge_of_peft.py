"""Folders of HF PEFT merged by the command: PEFT's own model in fp32, whatever this machine computes in."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import small_model
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lightning_peft.__main__ import main
from lightning_peft.adapters.inject import inject_adapters
from lightning_peft.adapters.lora import LoRAConfig, LoRAExperts, LoRALinear
from lightning_peft.adapters.merge import merge_adapters
from lightning_peft.models.tiny import tiny_tokenizer
from lightning_peft.quantization.config import Kind, QuantizationConfig
from lightning_peft.quantization.quantize import quantize_linears

IDS = torch.arange(3, 43)[None]
LORA: dict[str, Any] = {"r": 4, "task_type": "CAUSAL_LM"}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES: dict[str, tuple[str, dict[str, Any], Any]] = {
    # GPT-2 has learned positions: 64 of them here, fewer than the text that a merge is compared on.
    "an embedding": ("gpt2", {}, LoraConfig(**LORA, target_modules=["wte", "c_attn"], fan_in_fan_out=True)),
    "experts": ("qwen3_moe", {}, LoraConfig(**LORA, target_modules=["q_proj"], target_parameters=EXPERTS)),
    "dora": ("mixtral", {}, LoraConfig(**LORA, target_modules=["q_proj", "v_proj"], use_dora=True)),
    "pissa": ("cohere2", {}, LoraConfig(**LORA, target_modules="all-linear", init_lora_weights="pissa")),
    "ia3": ("llama", {}, IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])),
    "biases": ("qwen2", {}, LoraConfig(**LORA, target_modules=["q_proj"], bias="all")),
    "biases of the adapted": ("qwen2", {}, LoraConfig(**LORA, target_modules=["q_proj"], bias="lora_only")),
    "their lack": ("llama", {}, LoraConfig(**LORA, target_modules=["q_proj"], bias="lora_only")),
    "biases of an output": (
        "gpt2",
        {},
        LoraConfig(**LORA, target_modules=["c_attn"], bias="lora_only", fan_in_fan_out=True),
    ),
}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits


def saved_by_peft(name: str, folder: Path) -> nn.Module:
    """Save a base and an adapter far from its start; return PEFT's model."""
    family, options, config = CASES[name]
    small_model(family, vocab_size=320, **options).save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder / "adapter")
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_a_merge_is_the_model_of_peft(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_peft.commands.adapted.has_fast_bf16", lambda device: True)
    model = saved_by_peft(name, tmp_path)
    words = [f"adapter_path={tmp_path}/adapter", f"model={tmp_path}/base", f"output={tmp_path}/merged"]
    assert main(["merge", *words, "merge.dtype=fp32"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    expected = logits(model)
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    card = (tmp_path / "merged" / "README.md").read_text()
    assert f"# Fine-tuned {tmp_path}/base" in card and "of a folder of HF PEFT (adapter)" in card
    assert "| merged against adapter: mean kl |" in card and "Trained with the chat template" not in card


@pytest.mark.filterwarnings("ignore")
def test_a_plain_export_is_the_model_of_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_peft.commands.adapted.has_fast_bf16", lambda device: True)
    expected = logits(saved_by_peft("pissa", tmp_path))
    words = [f"adapter_path={tmp_path}/adapter", f"model={tmp_path}/base", f"output={tmp_path}/plain"]
    assert main(["export", *words, "format=plain"]) == 0
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, str(tmp_path / "plain"))
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore")
def test_codes_that_no_adapter_changes_are_as_exact_as_the_merge(tmp_path: Path) -> None:
    """Codes of a run in fp32 stand for numbers that the 16 bits of its base have no place for."""
    model, original = small_model("qwen3_moe"), small_model("qwen3_moe")
    for parameter in original.parameters():
        parameter.data = parameter.data.bfloat16()  # and no buffers: frequencies stay as they are
    model.load_state_dict(original.state_dict())
    quantize_linears(model, QuantizationConfig(Kind.nf4, block_size=32))
    inject_adapters(model, LoRAConfig(rank=4, target_modules=["q_proj"]))
    expected = logits(model)
    merged = merge_adapters(model, torch.float32, original=original, from_codes=True).float()
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_coded", [False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_that_ran_in_16_bits_are_added_to_the_published_ones(family: str, is_coded: bool) -> None:
    model, original, expected = small_model(family), small_model(family), small_model(family)
    with torch.no_grad():
        for one in (model, original, expected):
            for name, parameter in one.named_parameters():
                if name.endswith("bias"):
                    parameter.fill_(1 / 3)  # bf16 rounds them
    model.bfloat16()
    if is_coded:
        quantize_linears(model, QuantizationConfig(Kind.nf4, block_size=32))
    targets = [f"experts.{name.rpartition('.')[2]}" for name in EXPERTS]
    inject_adapters(model, LoRAConfig(rank=4, experts=2, target_modules=["q_proj", *targets]))
    changes = {}
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, LoRAExperts):
                layer.lora_B.normal_(0, 0.1)
                changes[name] = layer.delta_weight().mT if layer.base_layer.transposed else layer.delta_weight()
            elif isinstance(layer, LoRALinear):
                layer.lora_B.weight.normal_(0, 0.1)
                changes[f"{name}.weight"] = layer.delta_weight()
        for name, change in changes.items():
            expected.get_parameter(name).add_(change)
    merged = merge_adapters(model, original=original)
    assert changes and merged is original
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(merged.get_parameter(name), parameter, rtol=0, atol=1e-6)
