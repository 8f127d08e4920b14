"""The smallest change that makes a run fit."""

from collections.abc import Callable, Sequence
from typing import TypeVar

Config = TypeVar("Config")


def smallest_change(
    config: Config,
    changes: Sequence[Callable[[Config], Config | None]],
    peak: Callable[[Config], int],
    limit: float,
) -> Config | None:
    """Return the config after the first change that is enough by itself, else after all up to the first that is enough
    together with those before it; None where nothing is enough.

    `changes` come with the least costly first and give None where they change nothing. A change that does not lower the
    peak is left out.
    """
    for change in changes:
        changed = change(config)
        if changed is not None and peak(changed) <= limit:
            return changed
    before = peak(config)
    for change in changes:
        changed = change(config)
        if changed is None or (after := peak(changed)) >= before:
            continue
        config, before = changed, after
        if after <= limit:
            return config
    return None
