"""Damaged adapters of the tiny model, for the tests of what checks them."""

from pathlib import Path

import pytest
from damaged_adapters import save_all, settings_of

from lightning_peft.serving.adapter_checks import Settings


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    save_all(place := tmp_path_factory.mktemp("adapters"))
    return place


@pytest.fixture(scope="module")
def settings(place: Path) -> Settings:
    return settings_of(place)
