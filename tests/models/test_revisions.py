"""The commit of a preset's model: asked of the hub by itself, and another one from the cache where that is all."""

import logging
import re
from pathlib import Path

import huggingface_hub.constants
import pytest
import yaml

from lightning_peft.models.revisions import REVISIONS
from lightning_peft.models.source import ModelConfig, commit_of, locate, revision_of

PRESETS = Path(__file__).parents[2] / "conf" / "model"
NAME = "Qwen/Qwen3-0.6B"
OTHER = "0" * 40


def test_every_preset_of_the_hub_has_a_commit():
    paths = {path.stem: yaml.safe_load(path.read_text()).get("path") for path in PRESETS.glob("*.yaml")}
    named = {path for path in paths.values() if path is not None and not path.startswith("$")}
    assert named == REVISIONS.keys() and len(named) > 30
    assert all(re.fullmatch("[0-9a-f]{40}", commit) for commit in REVISIONS.values())


def test_a_revision_that_is_given_counts():
    assert revision_of(ModelConfig("hf", NAME)) == REVISIONS[NAME]
    assert revision_of(ModelConfig("hf", NAME, revision="main")) == "main"
    assert revision_of(ModelConfig("hf", "me/mine")) is None


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Return a function that puts a commit into the hub's cache of a machine without network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / f"models--{NAME.replace('/', '--')}"

    def put(commit: str) -> Path:
        snapshot = folder / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(commit)
        return snapshot

    return put


def test_the_commit_of_the_preset_is_taken_from_the_cache(cached, caplog):
    expected = cached(REVISIONS[NAME])
    cached(OTHER)
    assert locate(ModelConfig("hf", NAME)) == expected
    assert commit_of(ModelConfig("hf", NAME)) == REVISIONS[NAME]
    assert locate(ModelConfig("hf", NAME, revision="main")).name == OTHER
    assert not caplog.records


def test_another_commit_is_taken_with_a_line_where_it_is_all_there_is(cached, caplog):
    expected = cached(OTHER)
    with caplog.at_level(logging.WARNING):
        assert locate(ModelConfig("hf", NAME)) == expected
        locate(ModelConfig("hf", NAME))
    assert [record.getMessage() for record in caplog.records] == [
        f"model.path={NAME}: commit {REVISIONS[NAME][:12]} is not in the cache and the hub cannot be reached: taken is "
        f"what is there, {OTHER[:12]}"
    ]
    with pytest.raises(ValueError, match=f"model.path={NAME}: no such folder here, not in the cache"):
        locate(ModelConfig("hf", NAME, revision=REVISIONS[NAME]))


def test_a_model_that_is_nowhere_is_said(cached):
    with pytest.raises(ValueError, match=f"model.path={NAME}: no such folder here, not in the cache"):
        locate(ModelConfig("hf", NAME))
