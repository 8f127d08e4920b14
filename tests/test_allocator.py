"""Segments of GPU memory grow, unless somebody has decided otherwise."""

import os

import pytest

from lightning_peft.allocator import ALLOCATOR, let_segments_grow


@pytest.fixture
def environment(monkeypatch):
    for name in ALLOCATOR:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def test_segments_grow(environment):
    let_segments_grow()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


@pytest.mark.parametrize("name", ALLOCATOR)
def test_what_the_user_has_set_stands(environment, name):
    environment.setenv(name, "max_split_size_mb:128")
    let_segments_grow()
    assert {key: os.environ.get(key) for key in ALLOCATOR} == {
        key: "max_split_size_mb:128" if key == name else None for key in ALLOCATOR
    }
