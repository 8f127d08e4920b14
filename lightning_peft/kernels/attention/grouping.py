"""The arrangement of a packed batch's samples side by side for attention on a CPU, and their cut into strips.

Samples of like length make a group: each is padded to the longest, and all take the same strips, one batched product
for a strip of all samples and heads. A strip is a run of queries; its keys go from the first that its window reaches
(without one, the sample's first) to its last query. Two measured costs decide which samples share a group and where
strips are cut.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

MAX_STRIP, MIN_STRIP = 128, 32
"""Queries of a strip. Ours: shorter ones multiply slower, longer ones compute more of what the mask then hides."""
STRIP_COST, GROUP_COST = 3 * 2**15, 2**17
"""Scores that cost as much as the start of a strip's operators, and of a group's (fitted on two AVX-512 cores)."""
STRIP_BYTES = 2**25
"""fp32 scores of a strip longer than the shortest. Ours: with fewer the products of long samples are too small."""

SampleBounds = tuple[int, int]
"""Positions of its first token and past its last, in the flattened batch."""


class Strip(NamedTuple):
    """Queries `start` to `stop` of every sample of a group, whose keys go from `first` to `stop`."""

    start: int
    stop: int
    first: int
    mask: Tensor
    """Additive, fp32, (queries, masked keys): for the last keys of the strip, all those before are seen."""


class LengthGroup(NamedTuple):
    """Samples computed as if all were `length` tokens long; their tokens lie in slots, sample after sample."""

    samples: int
    length: int
    slots: slice
    strips: list[Strip]


class Reordering(NamedTuple):
    """The place of each token of the batch."""

    tokens: Tensor
    """(slots,): the position in the batch of each slot's token; in slots past a sample's end, of its last one."""
    is_padding: Tensor
    """(slots,): true where a slot is past its sample's end."""
    places: Tensor
    """(N,): the slot of each of the batch's tokens."""


class Arrangement(NamedTuple):
    """The groups of a batch, and the order of its slots; no reordering where they are the batch's positions."""

    groups: list[LengthGroup]
    num_slots: int
    reordering: Reordering | None


def find_samples(cu_seqlens: Tensor, rows: int, width: int) -> list[SampleBounds]:
    """Return the samples of a (rows, width) batch; ValueError where they do not fill it."""
    bounds = cu_seqlens.tolist()
    samples = list(zip(bounds[:-1], bounds[1:], strict=True))
    within_rows = all(a < b <= a // width * width + width for a, b in samples)
    if bounds[0] != 0 or bounds[-1] != rows * width or not within_rows:
        raise ValueError(f"cu_seqlens={bounds}: must rise from 0 to {rows * width}, no sample over two rows of {width}")
    return samples


@lru_cache(maxsize=4)  # the layers of a model, forward and backward, ask for the same ones
def arrange(samples: tuple[SampleBounds, ...], heads: int, window: int | None) -> Arrangement:
    """Group the samples of a batch; a query sees its sample's keys up to itself, at most the last `window`."""
    groups: list[LengthGroup] = []
    tokens, is_padding = [], []
    start = 0
    for members in group_samples(samples, heads, window):
        starts, stops = torch.tensor(members).unsqueeze(-1).unbind(1)
        length = int((stops - starts).max())
        positions = starts + torch.arange(length)
        tokens.append(positions.minimum(stops - 1).flatten())
        is_padding.append((positions >= stops).flatten())
        stop = start + positions.numel()
        groups.append(
            LengthGroup(len(members), length, slice(start, stop), cut_strips(length, len(members) * heads, window))
        )
        start = stop
    return Arrangement(groups, start, reorder(torch.cat(tokens), torch.cat(is_padding)))


def reorder(tokens: Tensor, is_padding: Tensor) -> Reordering | None:
    """Return where the tokens of a batch lie; None where slots are the batch's positions."""
    filled = (~is_padding).nonzero().flatten()
    places = torch.empty_like(filled)
    places[tokens[filled]] = filled
    if torch.equal(places, torch.arange(len(tokens))):
        return None
    return Reordering(tokens, is_padding, places)


def group_samples(samples: tuple[SampleBounds, ...], heads: int, window: int | None) -> list[list[SampleBounds]]:
    """Group the samples by falling length.

    A new group begins where the padding of the last one would cost more than a group does, or where even its shortest
    strip would have more scores than STRIP_BYTES.
    """
    by_length = sorted(samples, key=lambda sample: sample[0] - sample[1])
    groups: list[list[SampleBounds]] = [[]]
    longest, wasted = by_length[0][1] - by_length[0][0], 0
    for start, stop in by_length:
        length = stop - start
        wasted += heads * (scores(longest, window) - scores(length, window))
        if groups[-1] and (wasted > GROUP_COST or len(groups[-1]) == most_samples(longest, heads, window)):
            groups.append([])
            longest, wasted = length, 0
        groups[-1].append((start, stop))
    return groups


def scores(length: int, window: int | None) -> int:
    """Return how many keys the queries of a sample see, all queries together."""
    seen = min(length, window or length)
    return seen * (seen + 1) // 2 + (length - seen) * seen


def most_samples(length: int, heads: int, window: int | None) -> int:
    """Return how many samples of this length a group holds."""
    keys = length if window is None else min(length, window + MIN_STRIP)
    return max(1, STRIP_BYTES // (4 * heads * MIN_STRIP * keys))


def strip_length(batch: int, keys: int) -> int:
    """Return how many queries fit: their `batch` matrices of scores on so many keys take at most STRIP_BYTES.

    There are MIN_STRIP at least and MAX_STRIP at most.
    """
    fitting = STRIP_BYTES // (4 * batch * keys) // MIN_STRIP * MIN_STRIP
    return min(MAX_STRIP, max(MIN_STRIP, fitting))


def cut_strips(length: int, batch: int, window: int | None) -> list[Strip]:
    """Return the strips of `length` queries, in `batch` matrices side by side: the heads of all samples of a group.

    The cuts are at multiples of MIN_STRIP tokens, those with the fewest scores; a strip counts as STRIP_COST of them.
    """
    cuts = [*range(0, length, MIN_STRIP), length]
    cost, previous = [0], [0]
    for place in range(1, len(cuts)):
        ways = []
        for before in range(place - 1, -1, -1):
            queries, keys = cuts[place] - cuts[before], cuts[place] - first_key(cuts[before], window)
            if queries > strip_length(batch, keys):
                break
            ways.append((cost[before] + STRIP_COST + batch * queries * keys, before))
        least, best = min(ways)
        cost.append(least)
        previous.append(best)
    strips = []
    place = len(cuts) - 1
    while place > 0:
        strips.append(strip(cuts[previous[place]], cuts[place], window))
        place = previous[place]
    return strips[::-1]


def first_key(query: int, window: int | None) -> int:
    """Return the first key that a query sees."""
    return 0 if window is None else max(0, query - window + 1)


def strip(start: int, stop: int, window: int | None) -> Strip:
    first = first_key(start, window)
    # Where all queries begin at the same key, only the square on the diagonal hides anything.
    same_first = first_key(stop - 1, window) == first
    return Strip(start, stop, first, mask(stop - start, 0 if same_first else start - first, window))


@lru_cache(maxsize=64)  # most strips of a sample share theirs
def mask(queries: int, before: int, window: int | None) -> Tensor:
    """Return the additive mask of consecutive queries, for keys from `before` the first query to the last one."""
    query = torch.arange(queries)[:, None]
    key = torch.arange(-before, queries)
    hidden = key > query
    if window is not None:
        hidden |= key <= query - window
    return torch.zeros(hidden.shape, dtype=torch.float32).masked_fill_(hidden, float("-inf"))
