"""Batches of tokenised samples, collated here or by worker processes, from any place of an epoch on."""

import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from lightning_peft.data.batch import Batch, SourceOf
from lightning_peft.data.collate import collate_units
from lightning_peft.data.config import DataConfig
from lightning_peft.data.mixed_samples import MixedSamples
from lightning_peft.data.sampler import MicroBatchSampler, Request
from lightning_peft.data.token_store import Samples

SECONDS_AFTER_SIGTERM = 60
"""What a worker process lives on for after SIGTERM; a training process usually ends it sooner."""


class CollatedBatches(Dataset[Batch]):
    """The batch of each request."""

    def __init__(
        self,
        samples: Samples | MixedSamples,
        config: DataConfig,
        pad_token_id: int,
        source_of: Callable[[int], SourceOf] | None = None,
    ) -> None:
        """source_of: where a unit comes from, if all of a batch come from there."""
        self._samples = samples
        self._config = config
        self._pad_token_id = pad_token_id
        self._source_of = source_of

    def __getitem__(self, request: Request) -> Batch:
        rows = [[self._samples.unit(index) for index in row] for row in request.rows]
        config = self._config
        batch = collate_units(rows, self._pad_token_id, config.max_length, config.packing, request.filler)
        return batch if self._source_of is None else replace(batch, source=self._source_of(request.rows[0][0]))


class MicroBatchLoader(DataLoader[Batch]):
    """Iterates over the batches of a sampler's epoch, an epoch at each `iter`, and knows which was the last it gave.

    The state is the sampler's place behind the batches that were given, whatever workers have prepared ahead, so it
    can be loaded with another number of workers. A state that torchdata's loader saved holds the same place.
    """

    def __init__(self, batches: Dataset[Batch], sampler: MicroBatchSampler, num_workers: int) -> None:
        super().__init__(
            batches,
            batch_size=None,
            sampler=sampler,
            num_workers=num_workers,
            collate_fn=unchanged,
            worker_init_fn=_outlive_signals,
            # Each `iter` draws a seed for the workers. Drawn here, it moves no random number of the training.
            generator=torch.Generator(),
        )
        self._place = sampler

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # Runs at the first `next`: Lightning makes the iterator first and sets the epoch after.
        self._place.begin()
        for batch in super().__iter__():
            self._place.advance()
            yield batch
        self._place.end_epoch()

    def state_dict(self) -> dict[str, Any]:
        return self._place.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a place in the data. Raises ValueError where it was saved with other data."""
        saved = state.get("_snapshot", {}).get("_main_snapshot", state)  # torchdata's, with workers
        self._place.load_state_dict(saved.get("_index_sampler_state", saved))


def unchanged(batch: Any) -> Any:
    """Return the batch, which is collated already; a function of a module, as workers are sent it."""
    return batch


def _outlive_signals(worker: int) -> None:
    """SLURM signals every process of a job; a worker that died of it would take the step being finished with it."""
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(SECONDS_AFTER_SIGTERM))
