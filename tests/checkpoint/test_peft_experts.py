"""Adapters of stacked experts in HF PEFT's `target_parameters` form, both ways."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import small_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from lightning_peft.adapters.dora import DoRAConfig
from lightning_peft.adapters.inject import inject_adapters
from lightning_peft.adapters.lora import LoRAConfig
from lightning_peft.checkpoint.peft_check import objection_of_peft
from lightning_peft.checkpoint.peft_format import adapter_config_from_peft, load_adapter, save_adapter
from lightning_peft.checkpoint.peft_words import AdapterFileError

FAMILIES = ["mixtral", "gpt_oss", "llama4_text", "qwen3_moe", "granitemoe", "deepseek_v3"]
pytestmark = pytest.mark.filterwarnings("ignore")


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(3, 90, (2, 13), generator=torch.Generator().manual_seed(3))
    return model(ids, use_cache=False).logits


@pytest.fixture(autouse=True)
def same_start() -> None:
    """Begin both alike: HF PEFT draws A by the global generator; at times two experts of a token are equally good."""
    torch.manual_seed(0)


def perturbed(model: Any) -> Any:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def close(got: Tensor, expected: Tensor) -> None:
    """Compare in fp32: HF adds the change to the weight, ours is a product of its own."""
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_ours_is_the_same_adapter_in_peft(family: str, shared: bool, tmp_path: Path) -> None:
    model = small_model(family)
    config = LoRAConfig(
        rank=4, experts=3, target_modules="attention", dropout=0.1, rank_pattern={"down_proj": 2},
        experts_share_A=shared,
    )  # fmt: skip
    inject_adapters(model, config)
    perturbed(model)
    save_adapter(model, config, tmp_path / "adapter")

    assert objection_of_peft(tmp_path / "adapter", model) is None
    theirs = PeftModel.from_pretrained(small_model(family), str(tmp_path / "adapter")).eval()
    close(logits(theirs), logits(model))
    ours = small_model(family)
    inject_adapters(ours, adapter_config_from_peft(tmp_path / "adapter"))
    load_adapter(ours, tmp_path / "adapter")
    assert torch.equal(logits(ours), logits(model))
    again = small_model(family)  # one A goes on for all
    inject_adapters(again, config)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again.eval()), logits(model))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_peft_is_the_same_adapter_here(family: str, rslora: bool, tmp_path: Path) -> None:
    config = LoraConfig(
        r=4, lora_alpha=16, use_rslora=rslora, target_modules=["q_proj"], rank_pattern={"down_proj": 3},
        target_parameters=["experts.gate_up_proj", "experts.down_proj"], alpha_pattern={"experts.gate_up_proj": 5},
    )  # fmt: skip
    theirs = perturbed(get_peft_model(small_model(family), config))
    theirs.save_pretrained(tmp_path)

    ours = small_model(family)
    inject_adapters(ours, adapter_config_from_peft(tmp_path))
    load_adapter(ours, tmp_path)
    close(logits(ours), logits(theirs))


SHORT = [["down_proj"], ["gate_up_proj", "down_proj"], ["down_proj", "experts.gate_up_proj"]]


@pytest.mark.parametrize("parameters", SHORT, ids=str)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_parameters_named_by_their_last_part_are_those_of_experts_alone(
    family: str, parameters: list[str], tmp_path: Path
) -> None:
    theirs = get_peft_model(
        small_model(family), LoraConfig(r=4, target_modules=["o_proj", "q_proj"], target_parameters=parameters)
    )
    perturbed(theirs).save_pretrained(tmp_path)
    ours = small_model(family)
    inject_adapters(ours, adapter_config_from_peft(tmp_path))
    load_adapter(ours, tmp_path)
    close(logits(ours), logits(theirs))


@pytest.mark.parametrize("target", ["experts.gate_up_proj", "experts.down_proj"])
def test_experts_alone_and_one_of_their_parameters(target: str, tmp_path: Path) -> None:
    model, config = small_model("mixtral"), LoRAConfig(rank=4, target_modules=[target])
    inject_adapters(model, config)
    perturbed(model)
    save_adapter(model, config, tmp_path / "adapter")

    words = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert words["target_modules"] == []
    assert words["target_parameters"] == [f"model.layers.{layer}.mlp.{target}" for layer in (0, 1)]
    close(logits(PeftModel.from_pretrained(small_model("mixtral"), str(tmp_path / "adapter")).eval()), logits(model))


def test_other_parameters_are_refused_by_name(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["mlp.gate.weight"])
    get_peft_model(small_model("qwen3_moe"), config).save_pretrained(tmp_path)
    router = r"2 names such as model.layers.0.mlp.gate \(Qwen3MoeTopKRouter\) are no linear layers"
    with pytest.raises(ValueError, match=router):
        inject_adapters(small_model("qwen3_moe"), adapter_config_from_peft(tmp_path))

    config = LoraConfig(r=4, target_modules=["v_proj"], target_parameters=["linear_attn.conv1d.weights"])
    words = {**config.to_dict(), "target_modules": ["v_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(words, default=str))
    with pytest.raises(AdapterFileError, match="names linear_attn.conv1d.weights; of parameters only stacked experts"):
        adapter_config_from_peft(tmp_path)


@pytest.mark.parametrize("family", ["mixtral", "llama4_text"])
def test_dora_of_experts_is_read_here_and_peft_s_refusal_is_named(family: str, tmp_path: Path) -> None:
    model, config = small_model(family), DoRAConfig(rank=4, experts=3, target_modules="attention")
    inject_adapters(model, config)
    perturbed(model)
    save_adapter(model, config, tmp_path)

    assert "use_dora=True" in (objection_of_peft(tmp_path, model) or "")
    ours = small_model(family)
    inject_adapters(ours, adapter_config_from_peft(tmp_path))
    load_adapter(ours, tmp_path)
    assert torch.equal(logits(ours.eval()), logits(model))
