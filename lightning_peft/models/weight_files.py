"""The tensors of a checkpoint, each read when it is asked for."""

import json
import math
import mmap
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


class WeightSource(Protocol):
    """Named tensors of a checkpoint, read when asked for."""

    def names(self) -> list[str]: ...

    def read(self, name: str, dtype: torch.dtype | None) -> Tensor:
        """Return the tensor in its own memory, in `dtype` when given and floating, else as stored."""
        ...


class SafetensorsSource:
    """The tensors of one or more safetensors files, each from the one that `index` names where it names one.

    Raises ValueError for a file that is none, and for a tensor that two files hold: each with other values, or without
    an index that names one of them.
    """

    def __init__(self, paths: list[Path], index: Mapping[str, str] | None = None):
        self.files: dict[str, Any] = {}
        self.paths: dict[str, Path] = {}
        """The file that holds each tensor."""
        again: list[tuple[str, Path, Any]] = []
        for path in paths:
            try:
                file = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"model.path={path}: truncated or corrupt safetensors file ({error}): fetch it again"
                ) from error
            for name in file.keys():
                place = (index or {}).get(name)
                if place is None and name in self.paths:
                    raise ValueError(
                        f"model.path={path}: holds {name}, and so does {self.paths[name].name}: delete one"
                    )
                if place in (None, path.name):
                    self.files[name], self.paths[name] = file, path
                else:
                    again.append((name, path, file))
        if lacking := sorted((index or {}).keys() - self.files.keys()):
            raise ValueError(
                f"model.path={paths[0].parent}: its index names {lacking[0]}, which no file holds: fetch them again"
            )
        for name, path, file in again:
            if not _is_same(file.get_tensor(name), self.files[name].get_tensor(name)):
                raise ValueError(
                    f"model.path={path}: holds {name} with other values than {self.paths[name].name}, where the index "
                    "says it is: the files are of two saves; keep those of one"
                )

    def names(self) -> list[str]:
        return list(self.files)

    def read(self, name: str, dtype: torch.dtype | None) -> Tensor:
        mapped = self.files[name].get_tensor(name)
        # FP8 is no number without its scale: it stays as stored for whoever has one.
        is_cast = dtype is not None and mapped.is_floating_point() and mapped.itemsize > 1
        # This is a copy: the mapped pages would change under us if the file did.
        return mapped.to(dtype if is_cast else mapped.dtype, copy=True)


def _is_same(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors hold the same bytes, codes too."""
    same_kind = first.dtype == second.dtype and first.shape == second.shape
    return same_kind and torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (first, second)))


class PickledSource:
    """The tensors of one or more .bin files, mapped where torch wrote them as an archive; no code of theirs runs.

    Raises ValueError for a file that holds more than tensors, and for a tensor that two files hold.
    """

    def __init__(self, paths: list[Path]):
        self.tensors: dict[str, Tensor] = {}
        self.paths: dict[str, Path] = {}
        """The file that holds each tensor."""
        for path in paths:
            for name, tensor in _unpickled(path).items():
                if not isinstance(tensor, Tensor):
                    raise ValueError(
                        f"model.path={path}: holds {type(tensor).__name__} {name!r} where a tensor is expected: save "
                        "the model's state_dict alone"
                    )
                if name in self.paths:
                    raise ValueError(
                        f"model.path={path}: holds {name}, and so does {self.paths[name].name}: delete one"
                    )
                self.tensors[name], self.paths[name] = tensor.detach(), path

    def names(self) -> list[str]:
        return list(self.tensors)

    def read(self, name: str, dtype: torch.dtype | None) -> Tensor:
        stored = self.tensors[name]
        is_cast = dtype is not None and stored.is_floating_point() and stored.itemsize > 1
        return stored.to(dtype if is_cast else stored.dtype, copy=True)


def _unpickled(path: Path) -> dict[str, Any]:
    found: Any = None
    try:
        # Files from before torch 1.6 are no archives and cannot be mapped.
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(
            f"model.path={path}: its .bin weights are damaged, or hold more than tensors: "
            f"{' '.join(str(error).split())[:120]}"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"model.path={path}: holds {type(found).__name__} where a dict of tensors is expected")
    return found


def source_of_files(paths: list[Path], index: Mapping[str, str] | None = None) -> SafetensorsSource | PickledSource:
    """Return the tensors of files of one kind, by their ending."""
    return SafetensorsSource(paths, index) if paths[0].suffix == ".safetensors" else PickledSource(paths)


def map_file(path: Path) -> memoryview:
    """Return the file's bytes, read from disk where they are looked at."""
    with open(path, "rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def stored_tensors(path: Path) -> Iterator[tuple[str, list[int], memoryview]]:
    """Yield name, shape and mapped bytes of every tensor in a safetensors file, by its header."""
    for name, entry, data in _entries(path):
        yield name, entry["shape"], data


def stored_kinds(path: Path) -> Counter[str]:
    """Return how many numbers of each dtype are in a file, by safetensors' names."""
    sizes: Counter[str] = Counter()
    for _, entry, _ in _entries(path):
        sizes[entry["dtype"]] += math.prod(entry["shape"])
    return sizes


def _entries(path: Path) -> Iterator[tuple[str, dict[str, Any], memoryview]]:
    data = map_file(path)
    start = 8 + int.from_bytes(data[:8], "little")
    try:
        header = json.loads(bytes(data[8:start]))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                yield name, entry, data[start + begin : start + end]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"model.path={path}: truncated or corrupt safetensors file ({error})") from error
