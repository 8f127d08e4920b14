import random
import time

import pytest

from lightning_peft.data.packing import fill_ratio, group_by_length, pack, plan_micro_batches


def some_lengths(count: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [min(512, max(8, int(rng.lognormvariate(5, 0.6)))) for _ in range(count)]


def test_best_fit_by_hand():
    """The longest comes first: 6 leaves room for 2, 5 for 3, and 4 fits with 4."""
    packs = pack([3, 6, 4, 2, 4, 5], 8)
    assert sorted(map(sorted, packs)) == [[0, 5], [1, 3], [2, 4]]


@pytest.mark.parametrize("seed", range(5))
def test_every_sample_once_and_none_over(seed):
    lengths = some_lengths(1000, seed)
    packs = pack(lengths, 512, random.Random(seed))
    assert sorted(index for indices in packs for index in indices) == list(range(1000))
    assert all(sum(lengths[index] for index in indices) <= 512 for indices in packs)


def test_same_seed_same_packs_other_seed_other_packs_same_count():
    lengths = some_lengths(1000)
    first, again, other = (pack(lengths, 512, random.Random(seed)) for seed in (1, 1, 2))
    assert first == again
    assert sorted(map(sorted, first)) != sorted(map(sorted, other))
    assert len(first) == len(other)


def test_hundred_thousand_samples_in_two_seconds_and_nearly_full():
    lengths = some_lengths(100_000)
    start = time.process_time()
    packs = pack(lengths, 512, random.Random(0))
    assert time.process_time() - start < 2
    assert fill_ratio(packs, lengths, 512) > 0.99


def test_fill_ratio_by_hand():
    assert fill_ratio([[0, 1], [2]], [3, 4, 5], 8) == 12 / 16


def test_too_long_sample_is_an_error():
    with pytest.raises(ValueError, match="a sample of 9 tokens does not fit into rows of 8"):
        pack([3, 9], 8)


def test_groups_are_of_similar_length_and_complete():
    lengths = some_lengths(1003)
    batches = group_by_length(lengths, 4, random.Random(0))
    assert sorted(index for batch in batches for (index,) in batch) == list(range(1003))
    assert sorted(map(len, batches)) == [3] + [4] * 250
    padded = sum(len(batch) * max(lengths[index] for (index,) in batch) for batch in batches)
    assert sum(lengths) / padded > 0.95


@pytest.mark.parametrize("packing", [True, False])
def test_plan_has_as_many_micro_batches_in_every_epoch(packing):
    lengths = some_lengths(501)
    plans = [plan_micro_batches(lengths, 512, 4, packing, random.Random(epoch)) for epoch in range(5)]
    assert len({len(plan) for plan in plans}) == 1
    assert all(len(rows) <= 4 for plan in plans for rows in plan)
