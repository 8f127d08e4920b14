"""The demands of a compiled block on a GPU, held: launches, bytes, what it keeps for the backward pass, graphs."""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the device in name with"),
    pytest.mark.skipif(find_spec("triton") is None, reason="no triton (pip install triton)"),
]

LIMITS = {
    "lora": {"launches_a_block": 60, "adapters_gb": 60, "passes_gb": 181, "kept_gb_a_block": 0.79},
    "qlora": {"launches_a_block": 74, "adapters_gb": 60, "passes_gb": 181, "kept_gb_a_block": 0.79},
    "dora": {"launches_a_block": 80, "adapters_gb": 75, "passes_gb": 242, "kept_gb_a_block": 0.94},
}
"""The most of each on an 8B block of 2 x 4,096 tokens; bytes are those of a step of 32 blocks.

Fused passes are those of the whole step: a copy into wider rows, where nothing writes there, would be among them.
"""


@pytest.mark.parametrize("variant", LIMITS)
def test_a_block_asks_for_no_more_than_its_limits(variant, tmp_path):
    file = tmp_path / "figures.json"
    words = [sys.executable, "-m", "benchmarks.roofline", "--variants", variant, "--json", str(file)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(file.read_text())[variant]
    figures = {name: found[name] for name in LIMITS[variant]}
    assert all(figures[name] <= limit for name, limit in LIMITS[variant].items()), figures
    assert found["graphs"] == 2  # one forward, one backward
    if variant == "lora":
        assert found["tokens_per_second"] >= 15_300
