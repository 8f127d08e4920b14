"""Packed rows made rows of one sample each, for a model that turns out not to keep packed samples apart."""

import torch
from torch import Tensor

from lightning_peft.data.batch import IGNORED_LABEL, Batch
from lightning_peft.data.collate import LENGTH_MULTIPLE


def is_packed(batch: Batch) -> bool:
    """Return whether a row of the batch holds several samples."""
    return batch.cu_seqlens.numel() - 1 > batch.input_ids.shape[0]


def unpacked(batch: Batch, at_once: bool = False) -> list[Batch]:
    """Return the samples of a batch as rows of their own, up to the last label of each, longest first.

    A part holds about as many tokens, padding included, as `batch` does; with `at_once` there is one part. Samples
    without a label are left out, but for one where no sample has any.
    """
    samples = sorted(_samples(batch).items(), key=lambda sample: -len(sample[1]))
    parts, most = [], batch.input_ids.numel()
    while samples:
        width = -(-len(samples[0][1]) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        rows = len(samples) if at_once else max(1, most // width)
        parts.append(_rows(batch, dict(samples[:rows]), width))
        samples = samples[rows:]
    return parts


def _samples(batch: Batch) -> dict[int, range]:
    """Return where samples are in the flattened batch, by their number: up to their end, else to their last label."""
    bounds, labelled = batch.cu_seqlens.tolist(), (batch.labels != IGNORED_LABEL).flatten().cpu()
    ends = None if batch.num_units is None else batch.ends.tolist()
    found = {}
    for number, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        places = labelled[start:stop].nonzero()
        if len(places):
            found[number] = range(start, (start + int(places[-1]) if ends is None else ends[number]) + 1)
    return found or {0: range(bounds[0], min(bounds[1], LENGTH_MULTIPLE))}


def _rows(batch: Batch, samples: dict[int, range], width: int) -> Batch:
    device = batch.input_ids.device
    starts = torch.tensor([sample.start for sample in samples.values()], device=device)[:, None]
    lengths = torch.tensor([len(sample) for sample in samples.values()], device=device)[:, None]
    places = torch.arange(width, device=device).expand(len(samples), width)
    source = starts + torch.minimum(places, lengths - 1)
    labels = batch.labels.flatten()[source].masked_fill(places >= lengths, IGNORED_LABEL)
    weights: Tensor | None = None if batch.weights is None else batch.weights.flatten()[source]
    return Batch(
        input_ids=batch.input_ids.flatten()[source],
        labels=labels,
        position_ids=places,
        cu_seqlens=torch.arange(0, (len(samples) + 1) * width, width, dtype=torch.int32, device=device),
        max_seqlen=width,
        num_tokens=sum(len(sample) for sample in samples.values()),
        num_supervised=int((labels != IGNORED_LABEL).sum()),
        weights=weights,
        lengths=lengths[:, 0],
        sample_ids=torch.tensor(list(samples), device=device),
    )
