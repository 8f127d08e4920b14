"""How the samples of a packed batch are put side by side for attention on a CPU, and cut into strips.

Samples of like length make a group: each is padded to the longest, and all take the same strips, one batched product
for a strip of all samples and heads. A strip is a run of queries; its keys go from the first that its window reaches
(without one, the sample's first) to its last query. Which samples share a group and where strips are cut follows from
two measured costs.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

MAX_STRIP, MIN_STRIP = 128, 32
"""Queries of a strip. Ours: shorter ones multiply slower, longer ones compute more of what the mask then hides."""
STRIP_COST, GROUP_COST = 3 * 2**15, 2**17
"""Scores that cost as much as the start of a strip's operators, and of a group's (two AVX-512 cores)."""
STRIP_BYTES = 2**25
"""fp32 scores of a strip longer than the shortest. Ours: with fewer the products of long samples are too small."""

Segment = tuple[int, int]
"""Positions of a sample's first token and past its last, in the flattened batch."""


class Strip(NamedTuple):
    """Queries `start` to `stop` of every sample of a group, whose keys go from `first` to `stop`."""

    start: int
    stop: int
    first: int
    mask: Tensor
    """Additive, fp32, (queries, masked keys): for the last keys of the strip, all those before are seen."""


class Group(NamedTuple):
    """Samples computed as if all were `length` tokens long; their tokens lie in slots, sample after sample."""

    samples: int
    length: int
    slots: slice
    strips: list[Strip]


class Reordering(NamedTuple):
    """Which token of the batch is where."""

    tokens: Tensor
    """(slots,): the position in the batch of each slot's token; in slots past a sample's end, of its last one."""
    is_padding: Tensor
    """(slots,): whether a slot is past its sample's end."""
    places: Tensor
    """(N,): the slot of each of the batch's tokens."""


class Arrangement(NamedTuple):
    """The groups of a batch; no reordering where slots are the batch's positions."""

    groups: list[Group]
    slots: int
    reordering: Reordering | None


def find_segments(cu_seqlens: Tensor, rows: int, width: int) -> list[Segment]:
    """The samples of a (rows, width) batch."""
    bounds = cu_seqlens.tolist()
    segments = list(zip(bounds[:-1], bounds[1:], strict=True))
    within_rows = all(a < b <= a // width * width + width for a, b in segments)
    if bounds[0] != 0 or bounds[-1] != rows * width or not within_rows:
        raise ValueError(f"cu_seqlens={bounds}: must rise from 0 to {rows * width}, no sample over two rows of {width}")
    return segments


def arrange(cu_seqlens: Tensor, rows: int, width: int, heads: int, window: int | None) -> Arrangement:
    """Groups for a (rows, width) batch; a query sees its sample's keys up to itself, at most the last `window`."""
    return _arrange(tuple(find_segments(cu_seqlens, rows, width)), heads, window)


@lru_cache(maxsize=4)  # the layers of a model, forward and backward, ask for the same ones
def _arrange(segments: tuple[Segment, ...], heads: int, window: int | None) -> Arrangement:
    groups: list[Group] = []
    tokens, is_padding = [], []
    slots = 0
    for members in group_samples(segments, heads):
        starts, stops = torch.tensor(members).unsqueeze(-1).unbind(1)
        length = int((stops - starts).max())
        positions = starts + torch.arange(length)
        tokens.append(positions.minimum(stops - 1).flatten())
        is_padding.append((positions >= stops).flatten())
        end = slots + positions.numel()
        groups.append(Group(len(members), length, slice(slots, end), cut_strips(length, len(members) * heads, window)))
        slots = end
    return Arrangement(groups, slots, reorder(torch.cat(tokens), torch.cat(is_padding)))


def reorder(tokens: Tensor, is_padding: Tensor) -> Reordering | None:
    filled = (~is_padding).nonzero().flatten()
    places = torch.empty_like(filled)
    places[tokens[filled]] = filled
    if torch.equal(places, torch.arange(len(tokens))):
        return None
    return Reordering(tokens, is_padding, places)


def group_samples(segments: tuple[Segment, ...], heads: int) -> list[list[Segment]]:
    """Samples by falling length, a new group where the padding of the last one would cost more than a group does."""
    groups: list[list[Segment]] = [[]]
    longest = wasted = 0
    for start, stop in sorted(segments, key=lambda segment: segment[0] - segment[1]):
        length = stop - start
        longest = longest or length
        wasted += heads * (longest**2 - length**2) // 2  # of a square, half is seen
        shortest_strip = 4 * heads * (len(groups[-1]) + 1) * MIN_STRIP * longest
        if groups[-1] and (wasted > GROUP_COST or shortest_strip > STRIP_BYTES):
            groups.append([])
            longest, wasted = length, 0
        groups[-1].append((start, stop))
    return groups


def strip_length(heads: int, keys: int) -> int:
    """Queries whose scores of all heads on so many keys stay within STRIP_BYTES, from MIN_STRIP to MAX_STRIP."""
    fitting = STRIP_BYTES // (4 * heads * keys) // MIN_STRIP * MIN_STRIP
    return min(MAX_STRIP, max(MIN_STRIP, fitting))


def cut_strips(length: int, heads: int, window: int | None) -> list[Strip]:
    """The strips of `length` queries, of all samples' heads together.

    Of all ways to cut at every MIN_STRIP tokens, the one with the fewest scores; a strip counts as STRIP_COST of them.
    """
    cuts = [*range(0, length, MIN_STRIP), length]
    cost, previous = [0], [0]
    for place in range(1, len(cuts)):
        ways = []
        for before in range(place - 1, -1, -1):
            queries, keys = cuts[place] - cuts[before], cuts[place] - first_key(cuts[before], window)
            if queries > strip_length(heads, keys):
                break
            ways.append((cost[before] + STRIP_COST + heads * queries * keys, before))
        least, best = min(ways)
        cost.append(least)
        previous.append(best)
    strips = []
    place = len(cuts) - 1
    while place > 0:
        strips.append(mask_strip(cuts[previous[place]], cuts[place], window))
        place = previous[place]
    return strips[::-1]


def first_key(query: int, window: int | None) -> int:
    """The first key that a query sees."""
    return 0 if window is None else max(0, query - window + 1)


def mask_strip(start: int, stop: int, window: int | None) -> Strip:
    first = first_key(start, window)
    queries = torch.arange(start, stop)[:, None]
    # Where all queries begin at the same key, only the square on the diagonal hides anything.
    keys = torch.arange(start if first_key(stop - 1, window) == first else first, stop)
    hidden = keys > queries
    if window is not None:
        hidden |= keys <= queries - window
    return Strip(start, stop, first, torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf")))
