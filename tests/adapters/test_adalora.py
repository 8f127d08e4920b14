"""AdaLoRA's budget and its state; equality with HF PEFT stands in test_peft_parity."""

import pytest
import torch
from adapter_models import adapted, config_for, perturb, tokens
from torch import nn

from lightning_peft.adapters.adalora import AdaLoRALinear, RankSchedule
from lightning_peft.adapters.inject import adapters, step_schedule

OPTIONS = {"rank": 4, "target_rank": 2, "warmup_share": 0.1, "final_share": 0.2, "every_n_steps": 2}


def schedule_of(model: nn.Module, total_steps: int = 20) -> RankSchedule:
    schedule = step_schedule(model, config_for("adalora", **OPTIONS), total_steps)
    assert isinstance(schedule, RankSchedule)
    return schedule


def train(model: nn.Module, schedule: RankSchedule, steps: range) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in steps:
        optimizer.zero_grad()
        batch = tokens(length=8 + step % 4)
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        schedule.after_step(step)


def entries(model: nn.Module) -> list[int]:
    return [int((layer.lora_E != 0).sum()) for _, layer in adapters(model) if isinstance(layer, AdaLoRALinear)]


def test_budget_falls_with_the_cube() -> None:
    schedule = schedule_of(adapted("adalora", **OPTIONS))
    first, last = 14 * 4, 14 * 2

    assert [schedule.budget(step) for step in (0, 2, 16, 20)] == [first, first, last, last]
    assert schedule.budget(9) == int(last + (first - last) * 0.5**3)


def test_ranks_end_at_the_target_and_stay() -> None:
    model = perturb(adapted("adalora", **OPTIONS))
    schedule = schedule_of(model)

    train(model, schedule, range(1, 17))
    at_the_cut = entries(model)
    train(model, schedule, range(17, 21))

    assert sum(at_the_cut) == 14 * 2 and len(set(at_the_cut)) > 1
    assert entries(model) == at_the_cut


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("shares", [(0.1, 0.3), (0.4, 0.3), (0.1, 0.6)])
def test_shortest_runs_end_at_the_target(steps: int, shares: tuple[float, float]) -> None:
    options = OPTIONS | {"warmup_share": shares[0], "final_share": shares[1]}
    model = perturb(adapted("adalora", **options))
    schedule = step_schedule(model, config_for("adalora", **options), steps)
    assert isinstance(schedule, RankSchedule)

    train(model, schedule, range(1, steps + 1))

    assert sum(entries(model)) == 14 * 2


def test_scaling_is_of_the_first_rank() -> None:
    model = perturb(adapted("adalora", **OPTIONS))
    before = {layer.scaling for _, layer in adapters(model)}

    train(model, schedule_of(model), range(1, 21))

    # alpha = 2 x rank; HF's 1e-5 in the denominator.
    assert {layer.scaling for _, layer in adapters(model)} == before == {8 / (4 + 1e-5)}


def test_state_continues_where_it_stopped() -> None:
    whole, stopped = (perturb(adapted("adalora", **OPTIONS)) for _ in range(2))
    first = schedule_of(whole)
    second = schedule_of(stopped)
    for model, schedule in ((whole, first), (stopped, second)):
        train(model, schedule, range(1, 10))
    resumed = schedule_of(stopped)
    resumed.load_state_dict(second.state_dict())

    train(whole, first, range(10, 21))
    train(stopped, resumed, range(10, 21))

    for (_, one), (_, other) in zip(adapters(whole), adapters(stopped), strict=True):
        assert torch.equal(one.lora_E, other.lora_E)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_rank": 0}, "adapter.target_rank=0: must be from 1 to adapter.rank=4"),
        ({"target_rank": 5}, "adapter.target_rank=5: must be from 1 to adapter.rank=4"),
        ({"warmup_share": 1.0}, r"adapter.warmup_share=1.0: must be in \[0, 1\)"),
        ({"warmup_share": 0.6, "final_share": 0.5}, "leave no steps for cuts"),
        ({"beta1": 1.0}, r"adapter.beta1=1.0: must be in \(0, 1\)"),
        ({"every_n_steps": 0}, "adapter.every_n_steps=0: must be at least 1"),
        ({"orthogonality": -1.0}, "adapter.orthogonality=-1.0: must be 0 or more"),
    ],
)
def test_bad_option_is_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_for("adalora", **options)
