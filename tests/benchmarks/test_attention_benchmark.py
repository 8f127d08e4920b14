"""Implementations that are timed against each other compute the same."""

import json

import pytest
import torch

from benchmarks.attention import IMPLEMENTATIONS, inputs, main


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_every_implementation_gives_the_same_output_and_gradients(name):
    lengths = [7, 20, 5]
    results = []
    for attend in (IMPLEMENTATIONS["math by sample"], IMPLEMENTATIONS[name]):
        tensors = inputs(sum(lengths), torch.float32, "cpu")
        output = attend(*tensors, lengths)
        results.append([output, *torch.autograd.grad(output.square().sum(), tensors)])
    for expected, found in zip(*results, strict=True):
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.slow
def test_every_sample_length_is_measured(tmp_path):
    assert main(["--repeats", "1", "--output", f"{tmp_path}/attention.json"]) == 0
    rows = json.loads((tmp_path / "attention.json").read_text())["rows"]
    assert len(rows) == 4 and all(min(row.values()) > 0 for row in rows.values())
