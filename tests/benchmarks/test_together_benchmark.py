"""The benchmark of trials that train together, on the tiny model: it runs, and the ways compute the same."""

import json

from benchmarks import together


def test_step_together_is_measured_and_its_losses_are_those_alone(tmp_path):
    output = tmp_path / "together.json"
    together.main(["--model=tiny", "--tokens", "16", "--repeats=1", "--dtype=float32", f"--output={output}"])
    rows = json.loads(output.read_text())["rows"]
    assert rows["16 tokens a trial"]["first_losses_differ_by"] < 1e-6
    assert all(0 < rows[name]["ratio"] < 1 for name in together.MEMORY)
