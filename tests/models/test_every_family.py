"""Every family of transformers through everything that users do with it, beside the record of the findings.

With `--record` what is found is written into the record; without it a finding that is not the record's fails.
"""

import fcntl
import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch
from families import EVERY
from family_checks import BY_COMMANDS, QUICK, Check, Family, compare, refused
from rank_runs import adapter, train_on_ranks

from lightning_peft.models.blocks import check_blocks_can_be_sharded
from lightning_peft.models.families import CHECKS, OK, RECORD
from lightning_peft.models.loading import empty_model

pytestmark = pytest.mark.slow
TOGETHER = 8
"""Families whose ranks are started once, which takes longer than to train them."""
GROUPS = [EVERY[start : start + TOGETHER] for start in range(0, len(EVERY), TOGETHER)]
Found = Callable[[Family, str, Check], None]


def write_cell(name: str, check: str, cell: str) -> None:
    """Write one cell of the record; several processes may do so at once."""
    with RECORD.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        found = json.loads(file.read() or "{}")
        cells = {**found.get(name, {}).get("cells", {}), check: cell}
        row = {"transformers": metadata.version("transformers"), "cells": {c: cells[c] for c in CHECKS if c in cells}}
        found[name] = row
        ordered = {family: found[family] for family in EVERY if family in found}
        file.truncate(0)
        file.write(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")


def record(family: Family, check: str, run: Check) -> None:
    """Run a check and write what it found, a failure too."""
    try:
        cell = run(family) or OK
    except BaseException as error:
        write_cell(family.name, check, f"failed: {' '.join(f'{type(error).__name__}: {error}'.split())[:160]}")
        raise
    write_cell(family.name, check, cell)


@pytest.fixture(scope="session")
def found(request: pytest.FixtureRequest) -> Found:
    return record if request.config.getoption("--record") else compare


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("check", QUICK)
@pytest.mark.parametrize("family", EVERY, indirect=True)
def test_family(family: Family, check: str, found: Found) -> None:
    found(family, check, QUICK[check])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EVERY)
def test_commands(name: str, tmp_path: Path, found: Found) -> None:
    family = Family(name, tmp_path)
    for check, run in BY_COMMANDS.items():
        found(family, check, run)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("names", GROUPS, ids=lambda names: names[0])
def test_ranks_that_share_a_model(names: list[str], tmp_path: Path, found: Found) -> None:
    one, two = {}, {}
    apart = [name for name in names if not shares_weights(Family(name, tmp_path / name), found)]
    for name in apart:
        words = [*Family(name, tmp_path / name).train_words(), "model=hf", "data.packing=false", "trainer.max_steps=2"]
        one[f"{name}_one"] = [*words, "strategy=single", "trainer.accumulate_grad_batches=2"]
        two[f"{name}_two"] = [*words, "strategy=fsdp"]
    train_on_ranks(1, tmp_path, one)
    train_on_ranks(2, tmp_path, two)
    failures = []
    for name in apart:
        try:
            found(Family(name, tmp_path / name), "fsdp", lambda family: compare_runs(tmp_path, family.name))
        except (AssertionError, OSError) as error:
            failures.append(f"{name}: {error}")
    assert not failures


def shares_weights(family: Family, found: Found) -> bool:
    """Return whether no block of the model can be sharded, which is its cell then."""
    try:
        check_blocks_can_be_sharded(empty_model(family.config))
    except ValueError as error:
        reason = refused(error)
        found(family, "fsdp", lambda _: reason)
        return True
    return False


def compare_runs(folder: Path, name: str) -> str | None:
    trained, expected = adapter(folder / f"{name}_two"), adapter(folder / f"{name}_one")
    assert trained.keys() == expected.keys()
    for key in expected:
        # Adam divides by the root of a small square: sums over the ranks are taken in another order.
        torch.testing.assert_close(trained[key], expected[key], rtol=1e-3, atol=1e-4)
    return None
