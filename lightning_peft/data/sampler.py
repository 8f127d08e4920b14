"""The micro batch that comes next on each rank, and the place to go on from after an interruption."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch.utils.data import Sampler

from lightning_peft.data.packing import MicroBatch


class Request(NamedTuple):
    """A micro batch to collate."""

    rows: MicroBatch
    filler: bool
    """True for one that only keeps a rank in step: it has no labels and no tokens."""


def check_fingerprint(saved: str, now: str) -> None:
    """Raise ValueError where data are not those that a state was saved with."""
    if saved != now:
        raise ValueError(
            f"the training data are not those of the checkpoint (fingerprint {now}, then {saved}): go on with the same "
            "files and data options, or start a new run"
        )


class MicroBatchSampler(Sampler[Request]):
    """Rank r of w takes the micro batches r, r + w, r + 2w ... of an epoch's plan.

    The plan is a function of the epoch, so the data of a step do not depend on how many ranks share it. Where the plan
    is not a multiple of w, the last round is filled up with a micro batch that has no labels: all ranks make equally
    many steps, no sample is left out or counted twice. The state is the number of micro batches all ranks together
    have taken; it can be loaded at another world size. Workers ask for requests ahead of time, so the loader says
    when a batch is taken.
    """

    def __init__(self, plan: Callable[[int], list[MicroBatch]], rank: int, world_size: int, fingerprint: str) -> None:
        self._plan = plan
        self._rank = rank
        self._world_size = world_size
        self._fingerprint = fingerprint
        self._epoch = 0
        self._taken = 0
        self._resuming = False
        self._planned: tuple[int, list[MicroBatch]] = (-1, [])

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, as Lightning asks before each; a loaded position stays if it is of this epoch."""
        if epoch != self._epoch:
            self._epoch, self._taken = epoch, 0

    def __len__(self) -> int:
        """Return the micro batches of one rank in a whole epoch."""
        return -(-len(self._epoch_plan()) // self._world_size)

    def __iter__(self) -> Iterator[Request]:
        """Iterate over the requests from the present position to the end of the epoch, without moving it."""
        plan = self._epoch_plan()
        for first in range(self._taken, len(plan), self._world_size):
            index = first + self._rank
            yield Request(plan[index], False) if index < len(plan) else Request(plan[0][:1], True)

    def begin(self) -> None:
        """Go to where the epoch begins, or to the position that was loaded since."""
        if not self._resuming:
            self._taken = 0
        self._resuming = False

    def advance(self) -> None:
        """Count the batch that each rank has now been given."""
        self._taken += self._world_size

    def end_epoch(self) -> None:
        """Go to the next epoch."""
        self._epoch, self._taken = self._epoch + 1, 0

    def _epoch_plan(self) -> list[MicroBatch]:
        if self._planned[0] != self._epoch:
            self._planned = (self._epoch, self._plan(self._epoch))
        return self._planned[1]

    def state_dict(self) -> dict[str, Any]:
        finished = self._taken > 0 and self._taken >= len(self._epoch_plan())
        return {
            "epoch": self._epoch + finished,
            "taken": 0 if finished else self._taken,
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a position. Raises ValueError where the state was saved with other data."""
        check_fingerprint(state["fingerprint"], self._fingerprint)
        self._epoch, self._taken, self._resuming = state["epoch"], state["taken"], True
