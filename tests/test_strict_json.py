"""What is written as JSON is read by programs that know the standard alone."""

import json
import math
import re
from pathlib import Path

import pytest

import lightning_peft
from lightning_peft.runs.rollback import Rollback, write_rollbacks
from lightning_peft.strict_json import json_line, json_text
from lightning_peft.sweeps.sweep import MANIFEST, Sweep, Trial, read_sweep, write_sweep

WITHOUT_NUMBERS_OF_A_RUN = {
    "cache.py", "change_lock.py", "layout.py", "lineage.py", "multimodal.py", "origins.py", "peft_format.py",
    "plain.py", "ranks.py", "schema.py", "service_record.py", "submit.py", "teacher_files.py", "vllm.py",
}  # fmt: skip
"""Modules that write names, counts, digests and options, which are finite."""


def read_strictly(text: str):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_lacks_are_null(number):
    assert read_strictly(json_text({"a": [number, 1.0], "b": (number,)})) == {"a": [None, 1.0], "b": [None]}
    assert read_strictly(json_line({"é": number})) == {"é": None} and "é" in json_line({"é": number})


def test_manifest_with_a_result_of_another_version_is_strict(tmp_path):
    trial = Trial("t", ["seed=1"], result={"status": "finished", "validation_loss": math.nan})
    write_sweep(Sweep([], [], "local", "validation_loss", trials=[trial]), tmp_path)
    read_strictly((tmp_path / MANIFEST).read_text())
    assert read_sweep(tmp_path).trials[0].result["validation_loss"] is None
    write_rollbacks([Rollback(3, 0, math.inf, "by hand")], tmp_path)
    (path,) = [path for path in tmp_path.iterdir() if path.name != MANIFEST]
    read_strictly(path.read_text())


def test_files_with_numbers_of_a_run_are_written_strictly():
    writes = re.compile(r"write(_text)?\([^#]*json\.dumps")
    found = {
        path.name
        for path in Path(lightning_peft.__file__).parent.rglob("*.py")
        if any(writes.search(line) for line in path.read_text().splitlines())
    }
    assert found <= WITHOUT_NUMBERS_OF_A_RUN
