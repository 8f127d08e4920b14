"""Benchmarks start a process for everything they measure; their tests ask what is measured, not how fast it starts."""

import subprocess

import pytest
from started import forked_where_it_can_be


@pytest.fixture
def forked_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start processes of their own as ever, forked from one that has imported what they would."""
    monkeypatch.setattr(subprocess, "Popen", forked_where_it_can_be)
