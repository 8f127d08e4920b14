"""Hybrid-LoRA: its scores, its budget, and the gradients it looks at."""

from dataclasses import replace

import pytest
import torch
from adapter_models import config_for, llama, tokens
from torch import Tensor, nn

from lightning_peft.adapters.base import Target
from lightning_peft.adapters.hybrid_lora import HybridLoRAConfig, choose, residual_energy, select, watched, worth
from lightning_peft.adapters.inject import inject_adapters, trainable_parameter_counts, trained_in_full
from lightning_peft.adapters.method import Selection
from lightning_peft.adapters.targets import find_targets
from lightning_peft.optim.optimizers import OptimizerConfig, build_optimizer

CPU = torch.device("cpu")


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return model(input_ids=batch, labels=batch, use_cache=False).loss


def chosen(config: HybridLoRAConfig, quantized: bool = False) -> Selection:
    model = llama(quantized=quantized)
    batches = [tokens(length=length) for length in (8, 10)]
    return select(model, config, [lambda batch=batch: loss_of(model, batch) for batch in batches], CPU)


def hybrid(**options: object) -> HybridLoRAConfig:
    config = config_for("hybrid_lora", **options)
    assert isinstance(config, HybridLoRAConfig)
    return config


def test_gradient_of_a_low_rank_has_no_residual_and_scales_squared() -> None:
    torch.manual_seed(0)
    low = torch.randn(40, 3) @ torch.randn(3, 30)
    full = torch.randn(40, 30)
    exact = torch.linalg.svdvals(full.double())[3:].square().sum()

    assert residual_energy(low, 3) < 1e-6 * float(low.square().sum())
    assert residual_energy(full, 3) == pytest.approx(float(exact), rel=0.02)  # a flat spectrum: the hardest
    assert residual_energy(5 * full, 3) == pytest.approx(25 * residual_energy(full, 3), rel=1e-4)


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
def test_gradients_are_those_of_the_weights(quantized: bool) -> None:
    """The hooks add up over two batches what autograd gives dense weights of the same values."""
    from lightning_peft.quantization.quantize import dequantize_modules

    model, plain = llama(quantized=quantized), llama(quantized=quantized)
    targets = find_targets(model, hybrid(), (nn.Linear, type(model.model.layers[0].mlp.up_proj)))
    dequantize_modules(plain, [target.name for target in targets])
    plain.requires_grad_(True)
    model.requires_grad_(False)
    batches = [tokens(length=length) for length in (8, 10)]

    with watched(model, targets, squares=False) as sums:
        for batch in batches:
            loss_of(model, batch).backward()
    for batch in batches:
        loss_of(plain, batch).backward()

    assert len(sums) == 14
    for name, found in sums.items():
        expected = plain.get_submodule(name).weight.grad
        # fp32: the same products in another order.
        assert (found.total - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("budget_in", ["parameters", "modules"])
def test_choice_grows_with_the_budget_and_keeps_to_it(budget_in: str) -> None:
    targets = [Target(f"layer{i}", 10 * (i + 1), 20, 2, 4.0, i) for i in range(8)]
    scores = {t.name: float((7 * i) % 8) for i, t in enumerate(targets)}
    before: list[str] = []
    for budget in (0.3, 0.5, 0.7, 0.9):
        config = hybrid(budget=budget, budget_in=budget_in)
        found = choose(worth(scores, targets, config), targets, config)
        sizes = {t.name: 1 if budget_in == "modules" else t.out_features * 20 for t in targets}

        assert found[: len(before)] == before
        assert sum(sizes[name] for name in found) <= budget * sum(sizes.values())
        before = found


def test_each_score_chooses_and_random_does_not_look() -> None:
    found = {
        score: chosen(hybrid(score=score, budget=0.3)) for score in ("residual_energy", "preconditioned", "random")
    }
    by_norm = chosen(hybrid(score="grad_norm", budget=0.3, budget_in="modules"))

    assert all(selection.chosen for selection in found.values())
    assert list(by_norm.scores.values()) == sorted(by_norm.scores.values(), reverse=True) or by_norm.chosen[0] == max(
        by_norm.scores, key=lambda name: by_norm.scores[name]
    )
    assert found["random"] == chosen(hybrid(score="random", budget=0.3, probe_batches=1))
    drawn = [tuple(chosen(hybrid(score="random", budget=0.3, draw_seed=seed)).chosen) for seed in range(4)]
    assert len(set(drawn)) > 1 and drawn[0] == tuple(found["random"].chosen)


def test_chosen_modules_train_in_full_at_their_own_rate() -> None:
    config = hybrid(budget=0.3)
    selection = chosen(config)
    model = llama()
    before = sum(p.numel() for p in model.parameters())

    inject_adapters(model, selection.applied(config))

    names = trained_in_full(model)
    assert {name.removesuffix(".weight").removesuffix(".bias") for name in names} == set(selection.chosen)
    targets = {t.name: t for t in find_targets(llama(), config, (nn.Linear,))}
    low_rank = sum(4 * (t.out_features + t.in_features) for n, t in targets.items() if n not in selection.chosen)
    in_full = sum(p.numel() for name, p in model.named_parameters() if name in names)
    assert trainable_parameter_counts(model) == (low_rank + in_full, before + low_rank)
    optimizer = build_optimizer(model.named_parameters(), OptimizerConfig(lr=1e-3, full_lr=1e-5), names)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates["decay"] == 1e-3 and rates["full_decay"] == 1e-5
    assert {
        n for group in optimizer.param_groups if group["name"].startswith("full") for n in group["param_names"]
    } == names


def test_a_rate_for_nothing_is_refused() -> None:
    model = llama()
    inject_adapters(model, config_for("lora"))
    with pytest.raises(ValueError, match="optimizer.full_lr=1e-05: no module is trained in full"):
        build_optimizer(model.named_parameters(), OptimizerConfig(full_lr=1e-5), trained_in_full(model))


def test_budget_that_holds_nothing_says_so() -> None:
    with pytest.raises(ValueError, match="adapter.budget=0.01 adapter.budget_in=parameters: holds none of 14 modules"):
        chosen(hybrid(budget=0.01))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "luck"}, "adapter.score=luck: must be one of residual_energy, preconditioned"),
        ({"budget": 1.0}, "adapter.budget=1.0: must be above 0 and below 1"),
        ({"budget_in": "bytes"}, "adapter.budget_in=bytes: must be parameters or modules"),
        ({"probe_batches": 0}, "adapter.probe_batches=0: must be at least 1"),
        ({"init": "pissa"}, "adapter.init=pissa: rewrites a base"),
    ],
)
def test_bad_option_is_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hybrid(**options)


def test_count_on_llama_3_8b() -> None:
    """Ten down projections in full at rank 16."""
    from test_parameter_counts import meta_model

    chosen_names = [f"model.layers.{i}.mlp.down_proj" for i in range(10)]
    model = meta_model("llama_3_8b")
    config = replace(hybrid(), rank=16)
    inject_adapters(model, Selection(chosen_names, dict.fromkeys(chosen_names, 1.0), "x").applied(config))

    assert trainable_parameter_counts(model)[0] == 626_196_480
