"""The routed AdamW against AdamW, its scores against their formulas, and what a loser keeps."""

from typing import Any

import pytest
import torch
from adapter_models import adapted, config_for, tokens
from torch import Tensor, nn
from torch.optim import AdamW

from lightning_peft.adapters.inject import adapters, inject_adapters
from lightning_peft.optim.optimizers import OptimizerConfig, RoutedAdamWConfig, build_optimizer
from lightning_peft.optim.routed_adamw import RoutedAdamW
from lightning_peft.optim.sharded import load_named_state, named_state


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def routed(model: nn.Module, **options: Any) -> RoutedAdamW:
    config = RoutedAdamWConfig(**{"lr": 1e-2, "weight_decay": 0.1, **options})
    optimizer = build_optimizer(model.named_parameters(), config)
    assert isinstance(optimizer, RoutedAdamW)
    return optimizer


def take(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        batch = tokens(length=8 + step % 4)
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trained(model).items()}


def test_with_all_winning_it_is_adamw() -> None:
    one, other = adapted("molf_e"), adapted("molf_e")
    plain = AdamW(trained(other).values(), lr=1e-2, weight_decay=0.1, foreach=False)

    take(one, routed(one, winners=2), range(5))
    take(other, plain, range(5))

    # Adam divides small numbers by their own size: a last digit of the moments is one of the step.
    torch.testing.assert_close(values(one), values(other), rtol=1e-4, atol=1e-6)


def test_loser_keeps_its_numbers_while_its_moments_go_on() -> None:
    model = adapted("molf_e")
    optimizer = routed(model)
    take(model, optimizer, range(3))
    before, wins = values(model), optimizer.param_groups[0]["wins"].clone()
    moments = {n: optimizer.state[p]["exp_avg"].clone() for n, p in trained(model).items()}

    take(model, optimizer, range(3, 4))

    won = optimizer.param_groups[0]["wins"] - wins
    assert (won.sum(1) == 1).all()
    for name, parameter in trained(model).items():
        place = optimizer.places[parameter]
        moved = not torch.equal(parameter, before[name])
        assert moved == bool(won[place.layer, place.expert])
        assert not torch.equal(optimizer.state[parameter]["exp_avg"], moments[name]) or not parameter.grad.any()


@pytest.mark.parametrize("score", ["epd", "pfn"])
def test_winner_has_the_highest_score_of_the_formula(score: str) -> None:
    model = adapted("molf_e")
    optimizer = routed(model, score=score)
    take(model, optimizer, range(4))
    before = optimizer.param_groups[0]["wins"].clone()
    take(model, optimizer, range(4, 5))
    won = (optimizer.param_groups[0]["wins"] - before).argmax(1).tolist()

    for layer, (name, _) in enumerate(adapters(model)):
        scores = []
        for expert in ("0", "1"):
            parts = [
                p for n, p in trained(model).items() if n in (f"{name}.lora_A.{expert}", f"{name}.lora_B.{expert}")
            ]
            m = torch.cat([optimizer.state[p]["exp_avg"].flatten() for p in parts]).double()
            v = torch.cat([optimizer.state[p]["exp_avg_sq"].flatten() for p in parts]).double()
            steps = m / (v.sqrt() + 1e-8)
            scores.append(float((1e-2 * m * steps).mean() if score == "epd" else steps.square().mean().sqrt()))
        assert optimizer.layers[layer] == name and won[layer] == scores.index(max(scores))


def test_wins_are_counted_by_layer_and_expert() -> None:
    model = adapted("molf_e")
    optimizer = routed(model)
    take(model, optimizer, range(6))

    assert len(optimizer.report()) == 14
    assert all(sum(wins.values()) == 6 and list(wins) == ["0", "1"] for wins in optimizer.report().values())
    assert float(sum(optimizer.measured.values())) == pytest.approx(1.0)


def test_saved_state_goes_on_bit_equal() -> None:
    whole, stopped = adapted("molf_e"), adapted("molf_e")
    first, second = routed(whole), routed(stopped)
    take(whole, first, range(6))
    take(stopped, second, range(3))
    resumed = routed(stopped)
    load_named_state(resumed, named_state(second))

    take(stopped, resumed, range(3, 6))

    assert all(torch.equal(a, b) for a, b in zip(values(whole).values(), values(stopped).values(), strict=True))
    assert resumed.report() == first.report()


def test_moments_are_fp32_for_any_parameter() -> None:
    model = adapted("molf_e").bfloat16()
    optimizer = routed(model)
    take(model, optimizer, range(1))

    assert {state["exp_avg_sq"].dtype for state in optimizer.state.values()} == {torch.float32}
    assert {p.dtype for p in trained(model).values()} == {torch.bfloat16}


def test_a_ratio_of_lora_plus_reaches_every_expert() -> None:
    optimizer = routed(adapted("molf_e"), lora_plus_ratio=16.0)
    rates = {n: group["lr"] for group in optimizer.param_groups for n in group["param_names"]}

    assert {round(lr / 1e-2) for name, lr in rates.items() if "lora_B" in name} == {16}
    assert {round(lr / 1e-2) for name, lr in rates.items() if "lora_A" in name} == {1}
    assert len(optimizer.layers) == 14


def test_nothing_to_choose_from_is_an_error() -> None:
    with pytest.raises(ValueError, match="optimizer=routed_adamw: no layer has two experts"):
        build_optimizer(adapted("lora").named_parameters(), RoutedAdamWConfig())
    with pytest.raises(ValueError, match="optimizer.winners=3: a layer has 2 experts"):
        build_optimizer(adapted("molf_e").named_parameters(), RoutedAdamWConfig(winners=3))
    assert build_optimizer(adapted("molf_e").named_parameters(), OptimizerConfig()).param_groups


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "luck"}, "optimizer.score=luck: must be one of epd, pfn"),
        ({"winners": 0}, "optimizer.winners=0: must"),
    ],
)
def test_bad_option_is_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RoutedAdamWConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert_ranks": [8]}, r"adapter.expert_ranks=\[8\]: must be 2 or more ranks"),
        ({"expert_alpha": 0.0}, "adapter.expert_alpha=0.0: must be above 0"),
        ({"dropout": 1.0}, r"adapter.dropout=1.0: must be in \[0, 1\)"),
    ],
)
def test_bad_option_of_the_method_is_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_for("molf_e", **options)


def test_folder_is_one_lora_of_the_summed_rank(tmp_path) -> None:
    from peft import PeftModel

    from lightning_peft.checkpoint.peft_format import save_adapter
    from lightning_peft.models.tiny import tiny_model

    model = tiny_model().eval()
    inject_adapters(model, config := config_for("molf_e"))
    with torch.no_grad():
        for p in trained(model).values():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    save_adapter(model, config, tmp_path / "a", "tiny")
    ids = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(2))

    theirs = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "a")).eval()

    assert theirs.peft_config["default"].r == 6
    # Sums in another order; logits are of order 1 to 10.
    torch.testing.assert_close(theirs(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-5, atol=5e-5)
