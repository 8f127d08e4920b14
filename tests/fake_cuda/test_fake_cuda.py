"""The steps that a GPU would run, on fake tensors that lie on one: nothing on two devices, nothing waited for.

Their numbers are not seen here; the same steps on a CPU are for that.
"""

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from lightning_peft.adapters.registry import METHODS

HERE = Path(__file__).parent
KINDS = ("none", "nf4", "int8")
MODES = ("none", "elementwise", "blocks", "selective")
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit")
PLAIN: dict[str, Any] = {
    "method": "lora", "kind": "none", "checkpointing": "elementwise", "head": False, "dropout": 0.0,
    "optimizer": "adamw", "inside": False,
}  # fmt: skip


def takes(method: str, kind: str) -> bool:
    """Return whether a method trains on a base of that kind."""
    row = METHODS[method]
    return kind == "none" or not row.trains_all


CASES = [PLAIN | {"method": method, "kind": kind} for method in METHODS for kind in KINDS if takes(method, kind)]
CASES += [PLAIN | {"method": m, "checkpointing": mode} for m in ("lora", "dora") for mode in MODES]
CASES += [PLAIN | {"kind": "nf4", "checkpointing": mode, "dropout": 0.1} for mode in MODES]
CASES += [PLAIN | {"head": True, "kind": kind, "dropout": dropout} for kind in KINDS for dropout in (0.0, 0.1)]
CASES += [PLAIN | {"optimizer": name, "kind": kind} for name in OPTIMIZERS for kind in KINDS]
CASES += [PLAIN | {"inside": True, "method": m, "kind": kind} for m in ("lora", "dora") for kind in KINDS]
CASES += [PLAIN | {"inside": True, "checkpointing": mode} for mode in MODES]
CASES = list({json.dumps(case): case for case in CASES}.values())

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the device with"),
]


@cache
def outcomes(folder: Path) -> dict[str, dict[str, Any]]:
    """Run every case in one process, whose torch believes in a GPU; return what each gave by the case."""
    file = folder / "cases.json"
    file.write_text(json.dumps(CASES))
    done = subprocess.run(
        [sys.executable, "steps.py", str(file)],
        cwd=HERE,
        env=os.environ | {"PYTHONPATH": str(HERE.parent / "training")},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {json.dumps({key: row[key] for key in PLAIN}): row for row in rows}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fake_cuda")


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(str(value) for value in case.values()))
def test_step_stays_on_the_device_and_waits_for_nothing(case, folder):
    found = outcomes(folder)[json.dumps({key: case[key] for key in PLAIN})]
    assert found["error"] is None and found["waits"] == []
