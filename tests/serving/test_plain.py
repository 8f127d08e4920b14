"""A plain export is the adapter: for every method that is a low-rank sum, through HF PEFT too."""

import json
from pathlib import Path

import pytest
import torch
from adapter_models import adapted, config_for, llama, logits, perturb
from peft import PeftModel

from lightning_peft.adapters.inject import adapters, inject_adapters
from lightning_peft.adapters.lora import LoRAConfig
from lightning_peft.checkpoint.peft_format import adapter_config_from_peft, load_adapter
from lightning_peft.serving.plain import NotLowRankError, cut_pairs, inject_pairs, plain_pairs, write_plain

CASES = {
    "lora": config_for("lora"),
    "lora_fa": config_for("lora_fa"),
    "rslora": LoRAConfig(rank=4, rank_stabilized=True),
    "rank_pattern": LoRAConfig(rank=4, rank_pattern={"q_proj": 2, "layers.1.mlp.*": 6}),
    "alpha_pattern": LoRAConfig(rank=4, alpha=3.5, alpha_pattern={"v_proj": 16.0}),
    "pissa": LoRAConfig(rank=4, init="pissa"),
    "olora": LoRAConfig(rank=4, init="olora"),
    "adalora": config_for("adalora"),
    "vera": config_for("vera"),
    "head_and_embedding": LoRAConfig(rank=4, target_modules=["q_proj", "lm_head", "embed_tokens"]),
}


@pytest.mark.parametrize("case", CASES)
def test_plain_folder_gives_the_trained_logits_here_and_in_hf_peft(case: str, tmp_path: Path) -> None:
    model = llama()
    torch.manual_seed(1)
    inject_adapters(model, CASES[case])
    expected = logits(perturb(model))

    pairs = plain_pairs(model)
    write_plain(pairs, model, tmp_path, "org/base", None)

    words = json.loads((tmp_path / "adapter_config.json").read_text())
    assert words["r"] == words["lora_alpha"] == len(next(iter(pairs.values()))[0])
    assert words["base_model_name_or_path"] == "org/base" and "rank_pattern" not in words
    ours = llama()
    inject_adapters(ours, adapter_config_from_peft(tmp_path))
    load_adapter(ours, tmp_path)
    # fp32: another order of the same sums; a start that rewrote the base took a part out of it and puts it back.
    tolerance = {"rtol": 1e-4, "atol": 5e-5}
    torch.testing.assert_close(logits(ours.eval()), expected, **tolerance)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path).eval()), expected, **tolerance)
    put = llama()
    inject_pairs(put, pairs)
    torch.testing.assert_close(logits(put.eval()), expected, **tolerance)


def test_triplets_that_adalora_has_cut_are_left_out() -> None:
    model = perturb(adapted("adalora"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_E"):
                parameter[2:] = 0
    assert {len(A) for A, _ in plain_pairs(model).values()} == {2}


@pytest.mark.parametrize("method", ["dora", "hira", "ia3", "miss", "intrinsic", "lr_lora"])
def test_what_is_no_low_rank_sum_is_refused(method: str) -> None:
    with pytest.raises(NotLowRankError, match="is no low-rank sum: use `lightning-peft merge`"):
        plain_pairs(perturb(adapted(method)))


@pytest.mark.parametrize("method", ["lora", "lr_lora", "hira", "dora"])
def test_cut_is_the_best_of_its_rank_and_names_what_is_lost(method: str) -> None:
    model = perturb(adapted(method))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_c"):
                parameter.add_(0.5)
    changes = {name: layer.delta_weight().detach().double() for name, layer in adapters(model)}

    pairs, lost = cut_pairs(model, 3)

    for name, (A, B) in pairs.items():
        values = torch.linalg.svdvals(changes[name])
        residual = (changes[name] - B.double() @ A.double()).square().sum()
        # The residual of the best approximation is the energy of what follows (Eckart and Young); fp32 factors.
        torch.testing.assert_close(residual, values[3:].square().sum(), rtol=1e-3, atol=1e-9)
        assert lost[name] == pytest.approx(float(residual / changes[name].square().sum()), rel=1e-3, abs=1e-6)


def test_cut_of_a_changed_bias_is_refused() -> None:
    with pytest.raises(NotLowRankError, match="changes more than a linear weight"):
        cut_pairs(perturb(adapted("ia3")), 4)
