"""Learning rate over optimiser steps, as a factor of each group's own rate."""

import math
from dataclasses import dataclass
from enum import Enum

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class ScheduleKind(Enum):
    """Shape of the learning rate after the warm-up."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"
    wsd = "wsd"


@dataclass
class ScheduleConfig:
    """Warm up linearly to the peak, then follow `kind` down to `min_lr_ratio` at the last step."""

    kind: ScheduleKind = ScheduleKind.cosine
    """cosine and linear fall from the peak on, constant stays there, wsd stays and falls linearly at the end."""
    warmup_steps: int | None = None
    """Optimiser steps of warm-up; null: `warmup_fraction` of the run."""
    warmup_fraction: float = 0.03
    """Share of the run spent in warm-up when `warmup_steps` is null; 0.03 is QLoRA's."""
    min_lr_ratio: float = 0.0
    """Lowest factor of the peak, reached after the last step."""
    decay_fraction: float = 0.1
    """Share of the run in which wsd decays; a tenth, as MiniCPM (Hu et al. 2024, arXiv:2404.06395) recommends."""

    def __post_init__(self) -> None:
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise ValueError(f"schedule.warmup_steps={self.warmup_steps}: must be at least 0, or null for a fraction")
        for name, value in [
            ("warmup_fraction", self.warmup_fraction),
            ("min_lr_ratio", self.min_lr_ratio),
            ("decay_fraction", self.decay_fraction),
        ]:
            if not 0 <= value <= 1:
                raise ValueError(f"schedule.{name}={value}: must be between 0 and 1")
        if self.kind is ScheduleKind.constant and self.min_lr_ratio:
            raise ValueError(f"schedule.min_lr_ratio={self.min_lr_ratio}: schedule=constant never falls; leave it at 0")


def warmup_steps(total_steps: int, config: ScheduleConfig) -> int:
    """Return the optimiser steps of warm-up in a run of `total_steps`, at most all of them."""
    if config.warmup_steps is None:
        return math.ceil(config.warmup_fraction * total_steps)
    return min(config.warmup_steps, total_steps)


def lr_factor(step: int, total_steps: int, config: ScheduleConfig) -> float:
    """Return the factor of the peak rate for optimiser step `step`, counted from 0.

    In a warm-up of w steps, step w - 1 is the first at exactly the peak and step 0 already learns. Steps from
    `total_steps` on, which only a prolonged run has, stay at `min_lr_ratio`.
    """
    warmup = warmup_steps(total_steps, config)
    if step < warmup:
        return (step + 1) / warmup
    if config.kind is ScheduleKind.constant:
        return 1.0
    decay = total_steps - warmup
    if config.kind is ScheduleKind.wsd:
        decay = min(decay, math.ceil(config.decay_fraction * total_steps))
    remaining = min(1.0, max(0, total_steps - step) / decay) if decay else 0.0
    share = 0.5 * (1 - math.cos(math.pi * remaining)) if config.kind is ScheduleKind.cosine else remaining
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * share


def build_schedule(
    optimizer: Optimizer, config: ScheduleConfig, total_steps: int, rate_factor: float = 1.0
) -> LambdaLR:
    """Return a scheduler to be stepped after every optimiser step; every group follows the factor from its own rate.

    All rates are multiplied by `rate_factor` besides.
    """
    if total_steps < 1:
        raise ValueError(f"trainer.max_steps={total_steps}: a schedule needs a run of at least 1 step")
    return LambdaLR(optimizer, lambda step: rate_factor * lr_factor(step, total_steps, config))


def set_rates(optimizer: Optimizer, scheduler: LambdaLR) -> None:
    """Set every group to the rate that the scheduler gives for the step it is at."""
    for group, base, factor in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = base * factor(scheduler.last_epoch)
