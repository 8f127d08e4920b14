"""The one read of a safetensors file, against the library's reading tensor by tensor."""

from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lightning_peft.checkpoint.safetensors_file import DTYPES, read_file

OTHERS = {"int8": torch.arange(3, dtype=torch.int8), "bool": torch.tensor([True, False]), "scalar": torch.tensor(2.5)}


def test_tensors_are_those_of_the_library(tmp_path: Path) -> None:
    tensors = {name: torch.randn(3, 5).to(dtype) for name, dtype in DTYPES.items()} | OTHERS
    tensors["empty"] = torch.empty(0, 7)
    save_file(tensors, tmp_path / "x", metadata={"format": "pt"})
    found, content = read_file(tmp_path / "x")
    assert content == (tmp_path / "x").read_bytes()
    expected = load_file(tmp_path / "x")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_cut_file_is_an_error(tmp_path: Path, size: int) -> None:
    save_file({"x": torch.randn(3, 5)}, tmp_path / "x")
    content = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(content[:size])
    with pytest.raises(SafetensorError):
        read_file(tmp_path / "x")
