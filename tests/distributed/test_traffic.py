"""The traffic of a sharded step between ranks, and the memory that it keeps for gradients."""

import json
from pathlib import Path

import pytest
from started import run_on_ranks


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    file = tmp_path_factory.mktemp("traffic") / "measured.json"
    run_on_ranks(2, Path(__file__).with_name("count_traffic.py"), file, seconds=240)
    return json.loads(file.read_text())


@pytest.mark.multi_process
def test_4bit_blocks_move_a_quarter_of_the_bytes(measured):
    # The first gather is the root's: embeddings, norm and head, which stay dense. Adapters and norms are in both.
    dense, coded = (sum(measured[base]["gathered"][1:]) for base in ("bf16", "nf4"))
    assert len(measured["nf4"]["gathered"]) == len(measured["bf16"]["gathered"]) > 2
    assert 0.25 < coded / dense < 0.30


@pytest.mark.multi_process
@pytest.mark.parametrize("base", ["bf16", "nf4"])
def test_gradients_are_those_of_the_adapters_alone(measured, base):
    trained = measured[base]["trained"]
    assert trained <= sum(measured[base]["reduced"]) <= 1.02 * trained  # rows are padded to the number of ranks
    assert measured[base]["gradients"] * 2 == trained


@pytest.mark.multi_process
def test_dequantised_weights_are_the_same_after_sharding_and_a_step(measured):
    assert measured["nf4"]["same_weights"]
