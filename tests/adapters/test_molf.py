"""MoLF: a layer's weight competes with the LoRA beside it, and the run leaves their sum."""

from pathlib import Path

import pytest
import torch
from adapter_models import adapted, config_for, llama, logits, perturb, tokens
from tiny_runs import tiny_config

from lightning_peft.adapters.inject import adapters, inject_adapters
from lightning_peft.checkpoint.merged import merged_state
from lightning_peft.commands.evaluate import evaluate
from lightning_peft.commands.train import train
from lightning_peft.compose import compose_config
from lightning_peft.optim.optimizers import RoutedAdamWConfig, build_optimizer
from lightning_peft.optim.routed_adamw import RoutedAdamW


def test_every_weight_trains_and_a_loser_stays() -> None:
    model = adapted("molf")
    assert all(p.requires_grad for p in model.parameters())
    optimizer = build_optimizer(model.named_parameters(), RoutedAdamWConfig(lr=1e-2))
    assert isinstance(optimizer, RoutedAdamW)
    for _ in range(2):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        wins = optimizer.param_groups[0]["wins"].clone()
        optimizer.zero_grad()
        model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
        optimizer.step()

    won = (optimizer.param_groups[0]["wins"] - wins)[:, 0]  # each layer's weight and bias have them
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    for layer, (name, _) in enumerate(adapters(model)):
        assert (f"{name}.base_layer.weight" in moved) == bool(won[layer])
        assert (f"{name}.lora_B.0" in moved) != bool(won[layer])
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= moved


def test_merged_state_is_a_plain_model_of_the_sum() -> None:
    model = perturb(adapted("molf"))
    expected, untouched = logits(model), {name: t.clone() for name, t in model.state_dict().items()}

    plain = llama()
    plain.load_state_dict(merged_state(model))

    # fp32, and sums in another order.
    torch.testing.assert_close(logits(plain), expected, atol=2e-5, rtol=1e-4)
    assert all(torch.equal(untouched[name], tensor) for name, tensor in model.state_dict().items())


def test_run_leaves_a_whole_model(tmp_path: Path) -> None:
    words = ("method=molf", "adapter.expert_ranks=[4]", "trainer.max_steps=3")
    result = train(tiny_config(tmp_path / "run", *words))

    scored = evaluate(compose_config("evaluate", [f"adapter_path={tmp_path}/run", "max_rows=8", "models=adapter"]))

    assert scored["adapter"]["loss"] == pytest.approx(result["validation_loss"], rel=1e-5)
    assert not (tmp_path / "run" / "adapter").exists() and (tmp_path / "run" / "wins.json").is_file()


def test_codes_are_refused() -> None:
    with pytest.raises(ValueError, match="method=molf cannot train the quantised weight"):
        inject_adapters(llama(quantized=True), config_for("molf"))
    with pytest.raises(ValueError, match="method=molf quantization.kind=nf4: 4-bit weights cannot be trained"):
        compose_config("train", ["method=molf", "quantization=nf4", "model=tiny"])


def test_what_trains_anyway_is_not_named() -> None:
    with pytest.raises(ValueError, match="method molf trains every weight; leave it out"):
        config_for("molf", trainable_modules=["lm_head"])
