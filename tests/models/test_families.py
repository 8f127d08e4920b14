"""The families of transformers that people use most, through the checks that take a second, beside the record.

Every family goes through every check in `test_every_family.py`.
"""

import pytest
from families import EVERY, MOST_USED
from family_checks import QUICK, Family, compare

from lightning_peft.models.families import CHECKS, families

DEFAULT = ("load", "loss", "pack", "adapt", "nf4", "experts", "peft", "merge", "generate", "train")
"""Checks of the default suite."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("check", DEFAULT)
@pytest.mark.parametrize("family", MOST_USED, indirect=True)
def test_most_used_family(family: Family, check: str) -> None:
    compare(family, check, QUICK[check])


def test_the_record_is_whole_and_without_failures() -> None:
    found = families()
    assert list(found) == EVERY and len(EVERY) >= 90 and len(CHECKS) >= 16
    assert {name: row.cells.keys() ^ CHECKS.keys() for name, row in found.items()} == dict.fromkeys(EVERY, set())
    assert [
        (name, c) for name, row in found.items() for c, cell in row.cells.items() if cell.startswith("failed")
    ] == []
