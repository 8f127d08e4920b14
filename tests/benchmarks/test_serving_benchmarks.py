"""The benchmarks of generation and serving on the tiny model: all parts run, and what they compare is the same."""

import json
import sys

import pytest

from benchmarks import generate, serve

WORDS = ["model=tiny", "rank=r8", "target_modules=all_linear"]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*")
def test_generation_is_measured_and_its_answers_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "WORDS", WORDS)
    output = tmp_path / "generate.json"
    monkeypatch.setattr(
        sys, "argv", ["generate.py", "--batches", "2", "--tokens", "6", "--turns", "1", f"--output={output}"]
    )
    generate.main()
    row = generate.Results(output, settings_of(output)).rows["batch 2, float32"]
    assert row["same_greedy_answers_as_before"] == "2 of 2"
    assert set(row["tokens_per_cpu_second"]) == {"ours", "before", "peft", "base", "our_base"}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*")
def test_serving_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "WORDS", WORDS)
    monkeypatch.setattr(serve, "REGISTERED", 20)
    output = tmp_path / "serve.json"
    monkeypatch.setattr(sys, "argv", ["serve.py", "--tokens", "3", "--turns", "1", f"--output={output}"])
    serve.main()
    assert set(serve.Results(output, settings_of(output)).rows) == set(serve.PARTS)


def settings_of(path):
    return json.loads(path.read_text())["settings"]
