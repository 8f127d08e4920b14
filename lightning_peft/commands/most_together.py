"""The trials of a sweep that the memory of a machine holds in one process."""

import logging
import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import fields
from functools import cache, partial

from lightning_peft.command_configs.of_runs import EstimateConfig
from lightning_peft.commands.step_estimate import estimate_of, memory_key
from lightning_peft.commands.together import as_member
from lightning_peft.config import TrainConfig
from lightning_peft.estimation.memory import Estimate
from lightning_peft.runs.machine import GIB, Machine

logger = logging.getLogger(__name__)


def most_that_fit(configs: Iterable[TrainConfig], machine: Machine, processes: int = 1) -> int:
    """Return how many of these trials the memory of a machine holds together, in each of so many processes at once.

    Raises ValueError where nobody knows the memory, or not one trial fits.
    """
    kinds: dict[str, EstimateConfig] = {}
    members, room = [as_member(config) for config in configs], math.inf
    for config in members:
        options = {field.name: getattr(config, field.name) for field in fields(TrainConfig)}
        limit = machine.memory(config.device_memory_gib)
        if limit is None:
            raise ValueError("sweep.together=auto: no GPU here to ask for its memory; give a number, or "
                             "device_memory_gib")  # fmt: skip
        kinds.setdefault(memory_key(config), EstimateConfig(**options))
        room = min(room, limit / processes)
    most = len(members)
    estimate = cache(lambda key, count: estimate_of(kinds[key], count))
    largest = max((estimate(key, most).of_each for key in kinds), default=0)

    def bound(key: str, count: int) -> int:
        """Return the most that so many trials take while one of this kind passes, or several."""
        found: Estimate = estimate(key, count)
        return found.peak + (count - 1) * (largest - found.of_each)

    # One kind's pass may take most, and another's trials keep most while they wait for it.
    for key in kinds:
        if bound(key, most) > room:
            most = bisect_right(range(1, most), room, key=partial(bound, key))
        if most == 0:
            peak = max(estimate(key, 1).peak for key in kinds)
            of_each = f" for each of {processes} processes" if processes > 1 else ""
            raise ValueError(
                f"sweep.together=auto: a trial takes up to {peak / GIB:.2f} GiB, and there are {room / GIB:.2f}"
                f"{of_each}; `estimate` with the words of one says what would fit"
            )
    taken = max((bound(key, most) for key in kinds), default=0)
    logger.info(
        "sweep.together=auto: up to %d trials in a process, planned at %.2f of %.2f GiB", most, taken / GIB, room / GIB
    )
    return most
