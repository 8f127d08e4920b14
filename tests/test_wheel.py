"""The installed package works without the checkout: options and recipes travel inside the wheel."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_peft.kernels.native.library import AMX, AVX2, AVX512_BF16
from lightning_peft.training.host_memory import TENSOR_HEAP

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_wheel_outside_the_repository_trains_two_steps(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("lightning_peft-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)], check=True)
    words = ["train", "recipe=lora/text_to_sql", "model=tiny", "data.max_rows=8", "data.max_validation_rows=2"]
    command = [sys.executable, "-m", "lightning_peft", *words, "trainer.max_steps=2", "run_dir=run"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    of_processors = (*AVX512_BF16.headers, *AVX512_BF16.sources, *AVX2.sources, *AMX.sources)
    for name in (*of_processors, *TENSOR_HEAP.sources):
        assert (tmp_path / "site" / "lightning_peft" / "kernels" / "native" / name).is_file()
    where = [sys.executable, "-c", "import lightning_peft; print(lightning_peft.__file__)"]
    found = subprocess.run(where, check=True, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout
    assert found.startswith(str(tmp_path))
