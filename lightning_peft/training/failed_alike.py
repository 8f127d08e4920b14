"""The answer to whether a run that has failed on this rank fails on all: if not, no run of its group can go on."""

import itertools
import json
import threading
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from lightning_peft import distributed
from lightning_peft.compat import entered_collectives, store_of_ranks

TIME_TO_FOLLOW = timedelta(minutes=2)
"""Longest wait for the other ranks to fail as this one has: what all do alike, they do at about the same time. Ours."""
SECONDS_BETWEEN_WORDS = 1.0
"""Time between two words of a rank on how far it has come."""
SECONDS_BETWEEN_LOOKS = 0.1
SECONDS_TO_STOP = 5.0
_groups = itertools.count()
"""Groups of runs that this process has been in: the ranks count alike."""


class FailedAlike:
    """The words of ranks about their failures, by way of the store in which they have met.

    Each says every second which collectives it has entered, also while it waits in one. A rank that has entered one
    that a failed rank has not waits for it, and fails no more as that one did.
    """

    def __init__(self) -> None:
        """Begin to tell; without other ranks there is nobody to. All ranks make theirs."""
        self.store: dist.Store | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._tell, name="failed alike", daemon=True)
        if distributed.is_connected():
            self.store = dist.PrefixStore(f"failed alike {next(_groups)}", store_of_ranks())
            self._thread.start()

    def stop(self) -> None:
        """Tell no more: the ranks part."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(SECONDS_TO_STOP)

    def on_all(self, number: int) -> bool:
        """Return whether the run of this number has failed on every rank; asked on each where it has.

        Where another rank shows that it has gone on, the answer is there in seconds; else it takes `TIME_TO_FOLLOW`.
        """
        if self.store is None:
            return True
        own, deadline = entered_collectives(), time.monotonic() + TIME_TO_FOLLOW.total_seconds()
        ranks = range(dist.get_world_size())
        self.store.set(f"failed {number} {distributed.rank()}", "")
        failed = [f"failed {number} {rank}" for rank in ranks]
        while not self.store.check(failed):
            if time.monotonic() > deadline or any(is_ahead(self._heard_of(rank), own) for rank in ranks):
                return False
            time.sleep(SECONDS_BETWEEN_LOOKS)
        return True

    def _heard_of(self, rank: int) -> dict[str, int]:
        assert self.store is not None
        key = f"at {rank}"
        found: dict[str, Any] = json.loads(self.store.get(key)) if self.store.check([key]) else {}
        return found

    def _tell(self) -> None:
        assert self.store is not None
        told: dict[str, int] = {}
        while not self._stop.wait(SECONDS_BETWEEN_WORDS):
            if (now := entered_collectives()) == told:
                continue
            try:
                self.store.set(f"at {distributed.rank()}", json.dumps(now))
            except dist.DistError:  # whoever kept the store is gone, and the ranks hear of that by themselves
                return
            told = now


def is_ahead(other: dict[str, int], own: dict[str, int]) -> bool:
    """Return whether a rank has entered a collective, of a group of both, that this one has not."""
    return any(count > own[group] for group, count in other.items() if group in own)
