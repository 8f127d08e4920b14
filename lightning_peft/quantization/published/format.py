"""A published low-bit format: the tensors that make a weight, and the codes that they are."""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_peft.kernels.codes import Codes
from lightning_peft.kernels.low_bit import LOW_BIT

NAMED = {2: "uint2", 3: "uint4", 4: "uint4", 8: "uint8"}
"""Kind of codes that holds integers of so many bits; those of three bits take four."""


def matches_target(target: str, name: str) -> bool:
    """Return whether a layer is what config.json calls by this target: its name, or a pattern after "re:"."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target == name


class LowBitWeight(NamedTuple):
    """A weight (out, in), or a stack of them, in the codes of a published checkpoint."""

    kind: str
    """A kind of `LOW_BIT`."""
    block_size: int
    """Neighbouring columns that share a scale."""
    codes: Codes

    def to(self, device: torch.device) -> "LowBitWeight":
        return self._replace(codes=Codes(*(None if t is None else t.to(device) for t in self.codes)))  # type: ignore[arg-type]


class PublishedFormat(ABC):
    """One checkpoint's form of low-bit weights, by the `quantization_config` of its config.json.

    A weight's tensors share the beginning of their names. Making one raises ValueError for a variant that is not read.
    """

    weight: ClassVar[str]
    """End of the name of the parameter that a weight stands for, after the shared beginning."""
    markers: ClassVar[tuple[str, ...]]
    """Ends of the names that only a low-bit weight has."""
    parts: ClassVar[tuple[str, ...]]
    """Ends of the names of all tensors that make a weight."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Parts that a weight may lack."""
    unused: ClassVar[tuple[str, ...]] = ()
    """Ends of the names of tensors that say how activations are quantised: here they are not."""

    def __init__(self, options: Mapping[str, Any]):
        self.options = options

    @abstractmethod
    def describe(self) -> str:
        """Return the format in a few words, for a line of the log."""

    @abstractmethod
    def layout(self, name: str, rows: int, columns: int) -> LowBitWeight:
        """Return the codes of a layer's (rows, columns) weight, without values, on the meta device."""

    @abstractmethod
    def read(self, name: str, parts: Mapping[str, Tensor]) -> LowBitWeight:
        """Return the codes of a weight from its tensors as stored, by the ends of their names."""

    @abstractmethod
    def skipped(self) -> list[str]:
        """Return names or parts of names of layers that config.json says are dense; "re:" begins a pattern."""

    def weights(self, names: Collection[str]) -> dict[str, dict[str, str]]:
        """Return the low-bit weights among the tensors of a checkpoint: parameter name to part to tensor name.

        Raises ValueError for a weight that lacks a part.
        """
        names = set(names)
        stems = {name.removesuffix(end) for end in self.markers for name in names if name.endswith(end)}
        found = {}
        for stem in stems:
            parts = {end: stem + end for end in self.parts if stem + end in names}
            if self.is_whole(parts):
                found[stem + self.weight] = parts
            elif "" not in self.parts:
                lacking = [end for end in self.parts if end not in parts and end not in self.optional]
                raise ValueError(f"{stem + self.weight} is stored in parts, and {stem + lacking[0]} is not there")
        return found

    def is_whole(self, parts: Collection[str]) -> bool:
        """Return whether these parts make a weight."""
        return all(end in parts or end in self.optional for end in self.parts)


def empty_weight(
    kind: str,
    shape: tuple[int, int],
    block_size: int,
    scale_dtype: torch.dtype,
    scale_rows: int | None = None,
    zeros: bool = False,
    groups: bool = False,
) -> LowBitWeight:
    """Return codes without values, on the meta device, of a weight of shape (rows, columns)."""
    rows, columns = shape
    blocks = math.ceil(columns / block_size)
    with torch.device("meta"):
        codes = Codes(
            torch.empty(rows, columns // LOW_BIT[kind].per_byte, dtype=torch.uint8),
            torch.empty(scale_rows or rows, blocks, dtype=scale_dtype),
            torch.empty(rows, blocks, dtype=torch.uint8) if zeros else None,
            torch.empty(columns, dtype=torch.int32) if groups else None,
        )
    return LowBitWeight(kind, block_size, codes)


def from_words(words: Tensor, bits: int) -> Tensor:
    """Return the integers of `bits` bits packed along the rows of int32 words, lowest bits first, as uint8.

    words (n, m) give (32 n / bits, m). Integers of three bits straddle words, 32 of them in three.
    """
    period = 1 if 32 % bits == 0 else bits
    parts = words.unflatten(0, (-1, period))
    integers = []
    for first in range(0, 32 * period, bits):
        word, shift = divmod(first, 32)
        integer = (parts[:, word] >> shift) & (2 ** min(bits, 32 - shift) - 1)
        if shift + bits > 32:
            integer = integer | (parts[:, word + 1] & (2 ** (shift + bits - 32) - 1)) << (32 - shift)
        integers.append(integer.to(torch.uint8))
    return torch.stack(integers, dim=1).flatten(0, 1)


def even_groups(groups: Tensor | None, size: int) -> bool:
    """Return whether groups (in,) number the columns in their order, `size` to each."""
    return groups is None or torch.equal(groups.long(), torch.arange(len(groups), device=groups.device) // size)
