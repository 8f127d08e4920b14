import math

import pytest
import torch
from torch import nn

from lightning_peft.optim.schedules import ScheduleConfig, ScheduleKind, build_schedule, lr_factor, warmup_steps


def factors(total_steps: int, **options) -> list[float]:
    config = ScheduleConfig(**options)
    return [lr_factor(step, total_steps, config) for step in range(total_steps)]


def test_linear_by_hand():
    expected = [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert factors(6, kind=ScheduleKind.linear, warmup_steps=2) == expected


def test_constant_by_hand():
    assert factors(5, kind=ScheduleKind.constant, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine_by_hand():
    # Half a period from step 0: 1, (1 + cos(pi / 3)) / 2 = 3/4 at a third, 1/4 at two thirds.
    assert factors(3, kind=ScheduleKind.cosine, warmup_steps=0) == pytest.approx([1, 0.75, 0.25])
    half = factors(4, kind=ScheduleKind.cosine, warmup_steps=0, min_lr_ratio=0.1)[2]
    assert half == pytest.approx(0.1 + 0.9 * 0.5)


def test_wsd_by_hand():
    expected = [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert factors(10, kind=ScheduleKind.wsd, warmup_steps=2, decay_fraction=0.4) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ScheduleKind)
@pytest.mark.parametrize("warmup", [1, 7, 30])
def test_warmup_rises_to_exactly_the_peak(kind, warmup):
    values = factors(100, kind=kind, warmup_steps=warmup)
    assert values[warmup - 1] == 1.0 == max(values)
    assert values[:warmup] == sorted(values[:warmup])
    assert values[0] > 0


@pytest.mark.parametrize("kind", [ScheduleKind.cosine, ScheduleKind.linear, ScheduleKind.wsd])
def test_floor_is_reached_after_the_last_step(kind):
    config = ScheduleConfig(kind=kind, min_lr_ratio=0.1)
    assert lr_factor(99, 100, config) > 0.1
    assert lr_factor(100, 100, config) == lr_factor(150, 100, config) == pytest.approx(0.1)


def test_falling_parts_never_rise():
    for kind in (ScheduleKind.cosine, ScheduleKind.linear, ScheduleKind.wsd):
        values = factors(50, kind=kind, warmup_steps=5)[4:]
        assert values == sorted(values, reverse=True)


def test_warmup_is_a_fraction_unless_steps_are_given():
    assert warmup_steps(1000, ScheduleConfig(warmup_fraction=0.03)) == 30
    assert warmup_steps(10, ScheduleConfig(warmup_fraction=0.03)) == 1
    assert warmup_steps(1000, ScheduleConfig(warmup_steps=5, warmup_fraction=0.5)) == 5
    assert warmup_steps(3, ScheduleConfig(warmup_steps=100)) == 3
    assert factors(3, warmup_steps=100) == pytest.approx([1 / 3, 2 / 3, 1])


def test_every_group_follows_from_its_own_rate():
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1e-4, 1.6e-3)]
    optimizer = torch.optim.SGD(groups)
    scheduler = build_schedule(optimizer, ScheduleConfig(warmup_steps=2), 10)
    for step in range(10):
        factor = (step + 1) / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 8))
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-4 * factor, 1.6e-3 * factor])
        optimizer.step()
        scheduler.step()


def test_resumed_schedule_goes_on_where_it_stopped():
    def build():
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
        return optimizer, build_schedule(optimizer, ScheduleConfig(warmup_steps=3), 20)

    optimizer, scheduler = build()
    for _ in range(7):
        optimizer.step()
        scheduler.step()
    fresh_optimizer, fresh_scheduler = build()
    fresh_optimizer.load_state_dict(optimizer.state_dict())
    fresh_scheduler.load_state_dict(scheduler.state_dict())
    for o, s in ((optimizer, scheduler), (fresh_optimizer, fresh_scheduler)):
        o.step()
        s.step()
    assert optimizer.param_groups[0]["lr"] == fresh_optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_steps": -1}, "schedule.warmup_steps=-1: must be at least 0"),
        ({"warmup_fraction": 1.5}, "schedule.warmup_fraction=1.5: must be between 0 and 1"),
        ({"min_lr_ratio": -0.1}, "schedule.min_lr_ratio=-0.1: must be between 0 and 1"),
        (
            {"kind": ScheduleKind.constant, "min_lr_ratio": 0.1},
            "schedule.min_lr_ratio=0.1: schedule=constant",
        ),
    ],
)
def test_config_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**options)


def test_run_without_steps_is_an_error():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    with pytest.raises(ValueError, match="trainer.max_steps=0: a schedule needs a run of at least 1 step"):
        build_schedule(optimizer, ScheduleConfig(), 0)
