"""Weights of layers that HF PEFT's `target_parameters` names, read as adapters of the layers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import small_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from lightning_peft.adapters.inject import inject_adapters
from lightning_peft.checkpoint.peft_format import (
    AdapterFileError,
    adapter_config_from_peft,
    load_adapter,
    read_low_rank,
    save_adapter,
)

pytestmark = pytest.mark.filterwarnings("ignore")
TIED = {"tie_word_embeddings": True}
FORMS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "one_of_a_linear_layer": ("llama", {}, {"target_modules": ["v_proj"], "target_parameters": ["q_proj.weight"]}),
    "patterns_name_the_weight": (
        "llama",
        {},
        {
            "target_modules": ["v_proj"], "target_parameters": ["q_proj.weight", "k_proj.weight"], "use_rslora": True,
            "rank_pattern": {"q_proj.weight": 6}, "alpha_pattern": {"k_proj.weight": 3, "q_proj": 50},
        },
    ),
    "embedding": ("llama", {}, {"target_modules": [], "target_parameters": ["embed_tokens.weight", "lm_head.weight"]}),
    "embedding_of_tied_ends": ("llama", TIED, {"target_modules": [], "target_parameters": ["embed_tokens.weight"]}),
    "conv1d": ("gpt2", {}, {"target_modules": [], "target_parameters": ["attn.c_proj.weight", "c_attn.weight"]}),
    "beside_experts": (
        "qwen3_moe",
        {},
        {
            "target_modules": ["v_proj"], "alpha_pattern": {"q_proj.weight": 3},
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj", "q_proj.weight"],
        },
    ),
}  # fmt: skip


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(3, 90, (2, 13), generator=torch.Generator().manual_seed(3))
    return model.eval()(ids, use_cache=False).logits


def saved_by_peft(form: str, folder: Path) -> Tensor:
    """Save an adapter of PEFT far from its start; return the logits."""
    family, options, words = FORMS[form]
    torch.manual_seed(0)
    model = get_peft_model(small_model(family, **options), LoraConfig(r=4, **words))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(str(folder))
    return logits(model)


@pytest.mark.parametrize("form", FORMS)
def test_the_logits_are_peft_s_here_and_from_a_folder_of_ours(form: str, tmp_path: Path) -> None:
    family, options, _ = FORMS[form]
    expected = saved_by_peft(form, tmp_path / "theirs")
    ours, config = small_model(family, **options), adapter_config_from_peft(tmp_path / "theirs")
    inject_adapters(ours, config)
    load_adapter(ours, tmp_path / "theirs")
    # PEFT adds the change to the weight, ours is a product of its own, in fp32.
    tolerance = {"rtol": 0, "atol": 2e-5 * float(expected.abs().max())}
    torch.testing.assert_close(logits(ours), expected, **tolerance)
    save_adapter(ours, config, tmp_path / "ours")
    again = PeftModel.from_pretrained(small_model(family, **options), str(tmp_path / "ours"))
    torch.testing.assert_close(logits(again), expected, **tolerance)


def test_such_a_folder_is_served_alone(tmp_path: Path) -> None:
    saved_by_peft("conv1d", tmp_path)
    with pytest.raises(AdapterFileError, match=r"adapts parameters, as .*, whose layout the model alone tells"):
        read_low_rank(tmp_path)
