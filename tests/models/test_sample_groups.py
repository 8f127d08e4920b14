"""Which samples share a group, where their slots lie and how strips are cut."""

import pytest
import torch

from lightning_peft.models.sample_groups import (
    MAX_STRIP,
    MIN_STRIP,
    Arrangement,
    arrange,
    cut_strips,
    first_key,
    strip_length,
)


def of_lengths(*lengths: int, heads: int = 9, window: int | None = None) -> Arrangement:
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return arrange(bounds, 1, sum(lengths), heads, window)


def test_every_token_has_one_slot_in_its_sample() -> None:
    arrangement = of_lengths(90, 300, 95, 12, 91, 299, 14)
    assert arrangement.reordering is not None
    tokens, is_padding, places = arrangement.reordering
    assert torch.equal(tokens[places], torch.arange(901))
    assert len(tokens) == arrangement.slots and sorted(places.tolist()) == (~is_padding).nonzero().flatten().tolist()


def test_like_lengths_share_a_group_and_others_do_not() -> None:
    arrangement = of_lengths(90, 700, 95, 300, 91, 298)
    assert [(group.samples, group.length) for group in arrangement.groups] == [(1, 700), (2, 300), (3, 95)]


def test_samples_of_one_length_lie_as_in_the_batch() -> None:
    bounds = torch.arange(0, 4 * 512 + 1, 512)
    (group,), slots, reordering = arrange(bounds, 4, 512, 9, None)
    assert (group.samples, group.length, slots, reordering) == (4, 512, 2048, None)


def test_a_group_has_no_more_samples_than_its_shortest_strip_may_hold() -> None:
    groups = of_lengths(*[2000] * 20, heads=64).groups
    assert len(groups) > 1 and all(4 * 64 * group.samples * 2000 * MIN_STRIP <= 2**25 for group in groups)


def test_strips_get_shorter_where_their_scores_would_not_fit() -> None:
    assert strip_length(heads=9, keys=512) == MAX_STRIP
    assert strip_length(heads=32, keys=4096) == 64
    assert strip_length(heads=64, keys=10**6) == MIN_STRIP


@pytest.mark.parametrize("length", [1, 31, 90, 700])
@pytest.mark.parametrize("heads", [9, 600])
@pytest.mark.parametrize("window", [None, 50])
def test_strips_cover_every_query_once_and_begin_with_the_first_key_it_sees(
    length: int, heads: int, window: int | None
) -> None:
    strips = cut_strips(length, heads, window)
    assert [strip.start for strip in strips] == [0, *(strip.stop for strip in strips[:-1])]
    assert strips[-1].stop == length
    for strip in strips:
        assert strip.first == first_key(strip.start, window)
        assert strip.stop - strip.start <= strip_length(heads, strip.stop - strip.first)


@pytest.mark.parametrize("window", [None, 50])
def test_masks_hide_what_a_query_does_not_see(window: int | None) -> None:
    for strip in cut_strips(300, 9, window):
        for query in range(strip.start, strip.stop):
            seen = range(first_key(query, window), query + 1)
            row = torch.zeros(strip.stop - strip.first)
            row[len(row) - strip.mask.shape[1] :] += strip.mask[query - strip.start]
            assert [strip.first + int(key) for key in (row == 0).nonzero()] == list(seen)
