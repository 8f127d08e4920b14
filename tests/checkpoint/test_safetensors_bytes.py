"""Tensors that share the bytes of their file, and the library's word on what is no such file."""

import json
from collections.abc import Callable

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lightning_peft.checkpoint.safetensors_bytes import tensors_of

TENSORS = {
    "b": torch.arange(12.0).view(3, 4),
    "a": torch.randn(5).bfloat16(),
    "one": torch.tensor(2.0, dtype=torch.float64),
    "half": torch.ones(2, 1, 3).half(),
}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype is own.dtype and found[name].shape == own.shape and torch.equal(found[name], own)
        for name, own in expected.items()
    )


@pytest.mark.parametrize(
    "more", [{}, {"counts": torch.arange(3)}, {"none": torch.empty(0, 4)}], ids=["plain", "integers", "empty"]
)
def test_tensors_are_the_librarys(more: dict[str, Tensor]) -> None:
    content = save(TENSORS | more, metadata={"format": "pt"})
    found = tensors_of(bytearray(content))
    assert same(found, TENSORS | more) and same(load(content), TENSORS | more)
    for tensor in found.values():
        tensor.zero_()  # they may be written


def test_plain_tensors_share_the_bytes() -> None:
    content = bytearray(save(TENSORS))
    found = tensors_of(content)
    content[:] = bytes(len(content))
    assert not any(tensor.any() for tensor in found.values())


def with_header(change: Callable[[dict], object]) -> bytes:
    content = save(TENSORS)
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    change(header)
    written = json.dumps(header).encode()
    written += b" " * (-len(written) % 8)
    return len(written).to_bytes(8, "little") + written + content[start:]


def test_a_header_of_another_order_is_read() -> None:
    content = with_header(lambda header: [header.update({name: header.pop(name)}) for name in sorted(header)])
    assert same(tensors_of(bytearray(content)), TENSORS)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"1234567", bytes(8), bytes(100), b"\xff" * 20,
        save(TENSORS)[:-1], save(TENSORS) + b"0", save(TENSORS)[:30],
        with_header(lambda header: header["b"].update(shape=[3, 5])),
        with_header(lambda header: header["b"].update(shape=[-3, -4])),
        with_header(lambda header: header["b"].update(shape="34")),
        with_header(lambda header: header["b"].update(dtype="F33")),
        with_header(lambda header: header["b"].update(data_offsets=[0, 4])),
        with_header(lambda header: header["b"].update(data_offsets=["0", "48"])),
        with_header(lambda header: header["a"].update(data_offsets=header["b"]["data_offsets"])),
        with_header(lambda header: header.pop("a")),
        with_header(lambda header: header.update(b=[1])),
    ],
)  # fmt: skip
def test_what_is_no_such_file_is_the_librarys_error(content: bytes) -> None:
    with pytest.raises(SafetensorError):
        load(content)
    with pytest.raises(SafetensorError):
        tensors_of(bytearray(content))
