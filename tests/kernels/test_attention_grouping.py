"""The groups that samples share, the places of their slots and the cuts of strips."""

from itertools import pairwise

import pytest
import torch

from lightning_peft.kernels.attention.grouping import (
    MAX_STRIP,
    MIN_STRIP,
    STRIP_BYTES,
    Arrangement,
    arrange,
    cut_strips,
    first_key,
    strip_length,
)


def of_lengths(*lengths: int, heads: int = 9, window: int | None = None) -> Arrangement:
    bounds = torch.tensor([0, *lengths]).cumsum(0).tolist()
    return arrange(tuple(pairwise(bounds)), heads, window)


def test_every_token_has_one_slot_in_its_sample() -> None:
    lengths = [90, 300, 95, 12, 91, 299, 14]
    arrangement = of_lengths(*lengths)
    assert arrangement.reordering is not None
    tokens, is_padding, places = arrangement.reordering
    assert torch.equal(tokens[places], torch.arange(901))
    assert len(tokens) == arrangement.num_slots
    assert sorted(places.tolist()) == (~is_padding).nonzero().flatten().tolist()
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    samples = {tuple(range(a, b)) for a, b in pairwise(bounds)}
    for group in arrangement.groups:
        shape = group.samples, group.length
        for row, padding in zip(tokens[group.slots].view(shape), is_padding[group.slots].view(shape), strict=True):
            samples.remove(tuple(row[~padding].tolist()))
    assert not samples


def test_like_lengths_share_a_group_and_others_do_not() -> None:
    arrangement = of_lengths(90, 700, 95, 300, 91, 298)
    assert [(group.samples, group.length) for group in arrangement.groups] == [(1, 700), (2, 300), (3, 95)]


def test_windowed_samples_share_a_group_where_their_windows_are_full() -> None:
    assert [group.samples for group in of_lengths(1000, 996, 990, heads=32, window=64).groups] == [3]
    assert [group.samples for group in of_lengths(1000, 996, 990, heads=32).groups] == [2, 1]


def test_samples_of_one_length_lie_as_in_the_batch() -> None:
    samples = tuple(pairwise(range(0, 4 * 512 + 1, 512)))
    (group,), num_slots, reordering = arrange(samples, 9, None)
    assert (group.samples, group.length, num_slots, reordering) == (4, 512, 2048, None)


def test_a_group_has_no_more_samples_than_its_shortest_strip_may_hold() -> None:
    groups = of_lengths(*[2000] * 20, heads=64).groups
    assert len(groups) > 1 and all(4 * 64 * group.samples * 2000 * MIN_STRIP <= STRIP_BYTES for group in groups)


def test_strips_get_shorter_where_their_scores_would_not_fit() -> None:
    assert strip_length(batch=9, keys=512) == MAX_STRIP
    assert strip_length(batch=32, keys=4096) == 64
    assert strip_length(batch=64, keys=10**6) == MIN_STRIP


@pytest.mark.parametrize("length", [1, 31, 90, 700])
@pytest.mark.parametrize("batch", [9, 600])
@pytest.mark.parametrize("window", [None, 50])
def test_strips_cover_every_query_once_and_begin_with_the_first_key_it_sees(
    length: int, batch: int, window: int | None
) -> None:
    strips = cut_strips(length, batch, window)
    assert [strip.start for strip in strips] == [0, *(strip.stop for strip in strips[:-1])]
    assert strips[-1].stop == length
    for strip in strips:
        assert strip.first == first_key(strip.start, window)
        assert strip.stop - strip.start <= strip_length(batch, strip.stop - strip.first)


@pytest.mark.parametrize("window", [None, 50])
def test_masks_hide_what_a_query_does_not_see(window: int | None) -> None:
    for strip in cut_strips(300, 9, window):
        for query in range(strip.start, strip.stop):
            seen = range(first_key(query, window), query + 1)
            row = torch.zeros(strip.stop - strip.first)
            row[len(row) - strip.mask.shape[1] :] += strip.mask[query - strip.start]
            assert [strip.first + int(key) for key in (row == 0).nonzero()] == list(seen)
