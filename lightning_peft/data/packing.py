"""The choice of samples that share a row, and of rows that share a micro batch."""

import random
from bisect import bisect_left, insort
from collections.abc import Sequence

MicroBatch = list[list[int]]
"""Rows of a micro batch, each the indices of the samples packed into it."""

GROUPING_WINDOW = 64
"""Micro batches' worth of samples that are sorted by length together; ours."""


def pack(lengths: Sequence[int], capacity: int, rng: random.Random | None = None) -> list[list[int]]:
    """Return groups of sample indices whose lengths add up to at most `capacity`, by best fit, longest first.

    With `rng`, groups come in random order and samples of equal length are interchangeable. The number of groups
    depends on the lengths alone, so that every epoch has as many steps. Raises ValueError for a sample over the
    capacity.
    """
    if lengths and (longest := max(lengths)) > capacity:
        raise ValueError(f"a sample of {longest} tokens does not fit into rows of {capacity}")
    order = list(range(len(lengths)))
    if rng is not None:
        rng.shuffle(order)
    packs = _best_fit(sorted(order, key=lambda index: -lengths[index]), lengths, capacity)
    if rng is not None:
        rng.shuffle(packs)
    return packs


def _best_fit(indices: list[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    packs: list[list[int]] = []
    open_packs: dict[int, list[list[int]]] = {}
    spaces: list[int] = []  # sorted keys of open_packs: the free tokens of some pack
    for index in indices:
        place = bisect_left(spaces, lengths[index])
        if place == len(spaces):
            space = capacity
            packs.append(chosen := [])
        else:
            space = spaces[place]
            chosen = open_packs[space].pop()
            if not open_packs[space]:
                del open_packs[space], spaces[place]
        chosen.append(index)
        if left := space - lengths[index]:
            if left not in open_packs:
                insort(spaces, left)
            open_packs.setdefault(left, []).append(chosen)
    return packs


def fill_ratio(packs: Sequence[Sequence[int]], lengths: Sequence[int], capacity: int) -> float:
    """Return the share of the packs' tokens that are not padding, 0 to 1."""
    return sum(lengths[index] for indices in packs for index in indices) / (len(packs) * capacity) if packs else 0.0


def group_by_length(
    lengths: Sequence[int], micro_batch_size: int, rng: random.Random | None = None
) -> list[MicroBatch]:
    """Return micro batches of unpacked samples of similar length, in random order with `rng`."""
    order = list(range(len(lengths)))
    if rng is not None:
        rng.shuffle(order)
    batches = []
    window_size = GROUPING_WINDOW * micro_batch_size
    for start in range(0, len(order), window_size):
        window = sorted(order[start : start + window_size], key=lambda index: -lengths[index])
        batches += _cut([[index] for index in window], micro_batch_size)
    if rng is not None:
        rng.shuffle(batches)
    return batches


def plan_micro_batches(
    lengths: Sequence[int], max_length: int, micro_batch_size: int, packing: bool, rng: random.Random | None = None
) -> list[MicroBatch]:
    """Return all samples once, as micro batches of `micro_batch_size` rows; one may have fewer."""
    if packing:
        return _cut(pack(lengths, max_length, rng), micro_batch_size)
    return group_by_length(lengths, micro_batch_size, rng)


def _cut(rows: list[list[int]], size: int) -> list[MicroBatch]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]
