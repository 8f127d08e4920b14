"""From samples to a batch of tensors."""

from collections.abc import Sequence

import numpy as np
import torch

from lightning_peft.data.batch import IGNORED_LABEL, Batch
from lightning_peft.data.chat import Encoded
from lightning_peft.data.top_tokens import TopTokens

LENGTH_MULTIPLE = 8
"""Unpacked rows are padded to a multiple of this: tensor cores want it, and fewer lengths mean fewer compilations."""


def collate(
    rows: Sequence[Sequence[Encoded]],
    pad_token_id: int,
    max_length: int,
    packing: bool,
    filler: bool = False,
    group: int = 1,
) -> Batch:
    """The batch of these rows, each the samples packed into it; `group` of them follow each other and belong together.

    Rows are padded to `max_length` with packing, else to the longest row rounded up to a multiple of 8. A filler has
    no labels and counts no tokens: it keeps a rank in step that has no micro batch left.
    """
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
        margins=None if set(margins) == {None} else torch.tensor([margin or 0.0 for margin in margins]),
        weight_sum=None if weights is None else float(weights[labels != IGNORED_LABEL].sum(dtype=torch.float64)),
    )


def _collate_top(samples: Sequence[Encoded], filler: bool) -> TopTokens | None:
    """Return what is kept of a teacher at the supervised tokens; of none in a filler."""
    tops = [sample.top for sample in samples if sample.top is not None]
    if not tops:
        return None
    ids = np.concatenate([ids[:0] if filler else ids for ids, _, _ in tops])
    values = np.concatenate([values[:0] if filler else values for _, values, _ in tops])
    return TopTokens(torch.from_numpy(ids).long(), torch.from_numpy(values), tops[0][2])


def _collate_taught(
    samples: Sequence[Encoded], pad_token_id: int, max_length: int, packing: bool, filler: bool
) -> Batch | None:
    """Return the batch of what a teacher reads, of a mixture also the samples themselves; None where it reads the same.

    Its rows are as long as those of the samples, or as the longest of its own, and packed in the order of the samples.
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


def collate_units(
    rows: Sequence[Sequence[Sequence[Encoded]]],
    pad_token_id: int,
    max_length: int,
    packing: bool,
    filler: bool = False,
) -> Batch:
    """Return the batch of rows of units, each the samples that belong together.

    Packed rows are as many times `max_length` long as a unit has samples; without packing each sample has a row.
    """
    group = len(rows[0][0])
    if packing:
        samples = [[sample for unit in row for sample in unit] for row in rows]
        return collate(samples, pad_token_id, max_length * group, packing, filler, group)
    alone = [[sample] for row in rows for unit in row for sample in unit]
    return collate(alone, pad_token_id, max_length, packing, filler, group)
