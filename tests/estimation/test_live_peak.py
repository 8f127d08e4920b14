"""Real trainings against their estimates; all of them by `python benchmarks/planner.py`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2_135m lora 1x64", "smollm2_135m qlora 2x128"])
def test_measured_peak_is_within_the_bar(name, tmp_path):
    script = tmp_path / "benchmarks" / "planner.py"
    script.parent.mkdir()
    script.write_text((ROOT / "benchmarks" / "planner.py").read_text())
    subprocess.run([sys.executable, script, name], check=True, timeout=600)
    (result,) = json.loads((script.parent / "results" / "planner.json").read_text())["results"]
    assert abs(result["error"]) < 0.15


def test_committed_results_meet_the_bars():
    found = json.loads((ROOT / "benchmarks" / "results" / "planner.json").read_text())
    assert found["median_error"] < 0.05
    assert found["worst_error"] < 0.15
