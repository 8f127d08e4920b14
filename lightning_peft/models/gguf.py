"""Reading a GGUF file: its metadata, and its tensors one at a time.

The format is llama.cpp's (github.com/ggml-org/ggml, docs/gguf.md). The `gguf` package parses one in seconds where this
takes a tenth of one; its dequantisation is used for the types that are not common.
"""

import mmap
import os
import struct
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Metadata value type: struct code."""
STRING, ARRAY = 8, 9

PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
"""Tensor type: the dtype it is stored in."""
Q4_0, Q4_1, Q8_0 = 2, 3, 8
BLOCK = 32
"""Weights per block of Q4_0, Q4_1 and Q8_0."""
CHUNK = 1 << 18
"""Weights dequantised at once: 1 MiB in fp32 stays in the cache."""


class TensorEntry(NamedTuple):
    """The place of a tensor in the file."""

    shape: tuple[int, ...]
    kind: int
    """ggml's type number."""
    offset: int
    """Bytes from the start of the file."""


Header = tuple[dict[str, Any], dict[str, TensorEntry]]
"""A file's metadata by key, and the places of its tensors by name."""


class GGUFFile:
    """An open GGUF file: `fields` (metadata) and `tensors` (name to entry). Raises ValueError where it is none."""

    def __init__(self, path: str | Path, header: Header | None = None):
        """Map the file, and read its header unless it is known."""
        self.path = Path(path)
        try:
            with open(path, "rb") as file:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.fields, self.tensors = self._read_header() if header is None else header
        except (struct.error, UnicodeDecodeError, KeyError, IndexError) as error:
            raise ValueError(f"model.path={path}: truncated or corrupt GGUF file ({error})") from error
        except (ValueError, OSError) as error:
            raise ValueError(f"model.path={path}: cannot be read as a GGUF file ({error})") from error

    def _read_header(self) -> Header:
        if self.data[:4] != b"GGUF":
            raise ValueError("it does not start with GGUF")
        version, tensor_count, field_count = struct.unpack_from("<IQQ", self.data, 4)
        if version not in (2, 3):
            raise ValueError(f"version {version}, this reads 2 and 3")
        at = 24
        fields: dict[str, Any] = {}
        for _ in range(field_count):
            name, at = self._value(at, STRING)
            (kind,) = struct.unpack_from("<I", self.data, at)
            fields[name], at = self._value(at + 4, kind)
        entries = []
        for _ in range(tensor_count):
            name, at = self._value(at, STRING)
            (dimensions,) = struct.unpack_from("<I", self.data, at)
            *shape, kind, offset = struct.unpack_from(f"<{dimensions}QIQ", self.data, at + 4)
            at += 16 + 8 * dimensions
            entries.append((name, tuple(reversed(shape)), kind, offset))
        alignment = fields.get("general.alignment", 32)
        start = -(-at // alignment) * alignment
        return fields, {name: TensorEntry(shape, kind, start + offset) for name, shape, kind, offset in entries}

    def _value(self, at: int, kind: int) -> tuple[Any, int]:
        if kind == STRING:
            (length,) = struct.unpack_from("<Q", self.data, at)
            return self.data[at + 8 : at + 8 + length].decode(), at + 8 + length
        if kind == ARRAY:
            kind, count = struct.unpack_from("<IQ", self.data, at)
            at += 12
            if kind in SCALARS:
                code = f"<{count}{SCALARS[kind]}"
                return list(struct.unpack_from(code, self.data, at)), at + struct.calcsize(code)
            if kind == STRING:
                return self._strings(at, count)
            values = []
            for _ in range(count):
                value, at = self._value(at, kind)
                values.append(value)
            return values, at
        code = f"<{SCALARS[kind]}"
        return struct.unpack_from(code, self.data, at)[0], at + struct.calcsize(code)

    def _strings(self, at: int, count: int) -> tuple[list[str], int]:
        """Read an array of strings, with no call for each: a vocabulary and its merges are a hundred thousand."""
        data, length_at, values = self.data, struct.Struct("<Q").unpack_from, []
        for _ in range(count):
            start = at + 8
            at = start + length_at(data, at)[0]
            values.append(data[start:at].decode())
        return values, at

    def stored(self, name: str) -> memoryview:
        """Return the mapped bytes of a tensor. Raises ValueError where the file ends before they do."""
        entry = self.tensors[name]
        size = stored_bytes(entry)
        data = memoryview(self.data)[entry.offset : entry.offset + size]
        if len(data) != size:
            raise ValueError(f"model.path={self.path}: truncated, tensor {name} needs {size} bytes and has {len(data)}")
        return data

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return the tensor, dequantised in fp32 and cast once to `dtype`."""
        entry = self.tensors[name]
        data = torch.frombuffer(bytearray(self.stored(name)), dtype=torch.uint8)
        if entry.kind in PLAIN:
            return data.view(PLAIN[entry.kind]).to(dtype).view(entry.shape)
        output = torch.empty(prod(entry.shape), dtype=dtype)
        weights, stored = block_sizes(entry.kind)
        step = max(CHUNK // weights, 1)
        blocks = data.view(-1, stored)
        for start in range(0, blocks.shape[0], step):
            try:
                chunk = dequantize_blocks(blocks[start : start + step], entry.kind)
            except NotImplementedError as error:
                raise ValueError(f"model.path={self.path}: {name} cannot be read ({error})") from error
            output[start * weights : start * weights + chunk.numel()] = chunk.reshape(-1)
        return output.view(entry.shape)


def open_gguf(path: str | Path) -> GGUFFile:
    """Return the file; the header of the one opened last is read again only where the file has changed since.

    A run asks its file for the configuration, the tokenizer and the weights, and each time read its vocabulary.
    """
    try:
        status = os.stat(path)
    except OSError:
        return GGUFFile(path)  # which says what is wrong
    return GGUFFile(path, _header(path, status.st_ino, status.st_size, status.st_mtime_ns))


@lru_cache(maxsize=1)
def _header(path: str | Path, *version: int) -> Header:
    file = GGUFFile(path)
    return file.fields, file.tensors


def block_sizes(kind: int) -> tuple[int, int]:
    """Return the weights and bytes of one block."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType  # only GGUF files need the package

    return GGML_QUANT_SIZES[GGMLQuantizationType(kind)]


def stored_bytes(entry: TensorEntry) -> int:
    if entry.kind in PLAIN:
        return prod(entry.shape) * PLAIN[entry.kind].itemsize
    weights, stored = block_sizes(entry.kind)
    return prod(entry.shape) // weights * stored


def dequantize_blocks(blocks: Tensor, kind: int) -> Tensor:
    """Return (N, weights per block) fp32 of (N, bytes per block) uint8, bit for bit as the `gguf` package has them."""
    if kind == Q8_0:
        return blocks[:, 2:].view(torch.int8) * _halves(blocks, 0)
    if kind in (Q4_0, Q4_1):
        pairs = blocks[:, 2 if kind == Q4_0 else 4 :]
        codes = torch.cat([pairs & 0xF, pairs >> 4], 1)
        if kind == Q4_0:
            return (codes.float() - 8) * _halves(blocks, 0)
        return (codes * _halves(blocks, 0)).add_(_halves(blocks, 2))
    from gguf import GGMLQuantizationType, quants  # only the uncommon types need numpy's slow way

    return torch.from_numpy(quants.dequantize(blocks.numpy(), GGMLQuantizationType(kind)))


def _halves(blocks: Tensor, at: int) -> Tensor:
    """Return the fp16 number at byte `at` of each block, (N, 1) fp32."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()
