"""Make batches of tensors from samples, here or in worker processes, from any place of an epoch on."""

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_peft.data.batch import IGNORED_LABEL, Batch, SourceOf
from lightning_peft.data.chat import Encoded
from lightning_peft.data.config import DataConfig
from lightning_peft.data.mixed_samples import MixedSamples
from lightning_peft.data.sampler import MicroBatchSampler, Request
from lightning_peft.data.token_store import Samples
from lightning_peft.data.top_tokens import TopTokens

LENGTH_MULTIPLE = 8
"""Unpacked rows are padded to a multiple of this: tensor cores want it, and fewer lengths mean fewer compilations."""
SECONDS_AFTER_SIGTERM = 60
"""The time a worker process lives on for after SIGTERM; a training process usually ends it sooner."""


class CollatedBatches(Dataset[Batch]):
    """The batch of each request."""

    def __init__(
        self,
        samples: Samples | MixedSamples,
        config: DataConfig,
        pad_token_id: int,
        source_of: Callable[[int], SourceOf] | None = None,
    ) -> None:
        """Keep the parts of a batch; `source_of` gives the source of a unit, if all units of a batch share one."""
        self._samples = samples
        self._config = config
        self._pad_token_id = pad_token_id
        self._source_of = source_of

    def __getitem__(self, request: Request) -> Batch:
        samples, config = self._samples, self._config
        rows = [[sample for index in row for sample in samples.unit(index)] for row in request.rows]
        batch = collate(rows, self._pad_token_id, config.max_length, config.packing, request.filler, samples.group)
        return batch if self._source_of is None else replace(batch, source=self._source_of(request.rows[0][0]))


def collate(
    rows: Sequence[Sequence[Encoded]],
    pad_token_id: int,
    max_length: int,
    packing: bool,
    filler: bool = False,
    group: int = 1,
) -> Batch:
    """Return the batch of these rows, each the samples packed into it, of which `group` follow each other as a unit.

    Rows are padded to `group` times `max_length` with packing; without it each sample has a row of its own, and rows
    are padded to the longest one rounded up to a multiple of 8. A filler has no labels and counts no tokens: it keeps a
    rank in step that has no micro batch left.
    """
    if group > 1:
        rows = rows if packing else [[sample] for row in rows for sample in row]
        max_length = max_length * group if packing else max_length
    longest = max(sum(len(sample.input_ids) for sample in row) for row in rows)
    width = max_length if packing else min(max_length, -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)
    input_ids = torch.full((len(rows), width), pad_token_id, dtype=torch.int64)
    labels = torch.full((len(rows), width), IGNORED_LABEL, dtype=torch.int64)
    position_ids = torch.empty((len(rows), width), dtype=torch.int64)
    weighted = any(sample.weights is not None for row in rows for sample in row)
    weights = torch.ones((len(rows), width)) if weighted else None
    starts: list[int] = []
    lengths: list[int] = []
    num_tokens = 0
    for number, row in enumerate(rows):
        end = 0
        for place, sample in enumerate(row):
            start, end = end, end + len(sample.input_ids)
            stop = width if place == len(row) - 1 else end
            input_ids[number, start:end] = torch.tensor(sample.input_ids)
            if not filler:
                labels[number, start + 1 : end] = torch.tensor(sample.labels[1:], dtype=torch.int64)
            if weights is not None and sample.weights is not None:
                weights[number, start:end] = torch.tensor(sample.weights)
            position_ids[number, start:stop] = torch.arange(stop - start)
            starts.append(number * width + start)
            lengths.append(end - start)
        num_tokens += end
    samples = [sample for row in rows for sample in row]
    margins = [sample.margin for sample in samples[::group]]
    standings = [sample.standing for sample in samples if sample.standing is not None]
    cu_seqlens = torch.tensor([*starts, len(rows) * width], dtype=torch.int32)
    return Batch(
        input_ids=input_ids,
        labels=labels,
        position_ids=position_ids,
        cu_seqlens=cu_seqlens,
        max_seqlen=int(cu_seqlens.diff().max()),
        num_tokens=0 if filler else num_tokens,
        num_supervised=int((labels != IGNORED_LABEL).sum()),
        weights=weights,
        lengths=torch.tensor(lengths),
        standings=torch.tensor(standings, dtype=torch.uint8) if standings else None,
        num_units=None if group == 1 else 0 if filler else len(starts) // group,
        top=_collate_top(samples, filler),
        taught=_collate_taught(samples, pad_token_id, max_length, packing, filler),
        origins=() if filler else tuple(dict.fromkeys(sample.origin for sample in samples if sample.origin)),
        margins=None if set(margins) == {None} else torch.tensor([margin or 0.0 for margin in margins]),
        weight_sum=None if weights is None else float(weights[labels != IGNORED_LABEL].sum(dtype=torch.float64)),
    )


def _collate_top(samples: Sequence[Encoded], filler: bool) -> TopTokens | None:
    """Return what is kept of a teacher at the supervised tokens, which a filler has none of."""
    tops = [sample.top for sample in samples if sample.top is not None]
    if not tops:
        return None
    ids = np.concatenate([ids[:0] if filler else ids for ids, _, _ in tops])
    values = np.concatenate([values[:0] if filler else values for _, values, _ in tops])
    return TopTokens(torch.from_numpy(ids).long(), torch.from_numpy(values), tops[0][2])


def _collate_taught(
    samples: Sequence[Encoded], pad_token_id: int, max_length: int, packing: bool, filler: bool
) -> Batch | None:
    """Return the batch that a teacher reads, in a mixture with the samples themselves; None where it reads the same.

    The batch's rows are as long as those of the samples, or as its longest, and packed in the order of the samples.
    """
    if all(sample.taught is None for sample in samples):
        return None
    taught = [sample.taught or sample for sample in samples]
    width = max(max_length, *(len(sample.input_ids) for sample in taught))
    rows: list[list[Encoded]] = []
    free = 0
    for sample in taught:
        if not packing or len(sample.input_ids) > free:
            rows.append([])
            free = width
        rows[-1].append(sample)
        free -= len(sample.input_ids)
    return collate(rows, pad_token_id, width, packing, filler)


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
        # This runs at the first `next`: Lightning makes the iterator first and sets the epoch after.
        self._place.begin()
        for batch in super().__iter__():
            self._place.advance()
            yield batch
        self._place.end_epoch()

    def state_dict(self) -> dict[str, Any]:
        return self._place.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a place in the data. Raises ValueError for a place saved with other data."""
        saved = state.get("_snapshot", {}).get("_main_snapshot", state)  # torchdata's, with workers
        self._place.load_state_dict(saved.get("_index_sampler_state", saved))


def unchanged(batch: Any) -> Any:
    """Return the batch, which is collated already; a function of a module, as workers are sent it."""
    return batch


def _outlive_signals(worker: int) -> None:
    """Outlive what SLURM signals to every process of a job: a dead worker would take the step at work with it."""
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(SECONDS_AFTER_SIGTERM))
