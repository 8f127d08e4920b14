"""Many small matrices copied, and cast, into places inside larger ones in one launch: a kernel of Triton.

torch copies lists of tensors together only where source and place lie alike; each of these would be a launch.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Numbers that a program copies."""


@triton.jit
def _copy_matrices(table, source_like, into_like, BLOCK: tl.constexpr):
    matrix, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = table + 5 * matrix
    source, into = tl.load(row).to(source_like.dtype), tl.load(row + 1).to(into_like.dtype)
    count, width, stride = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    place = part * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    inside = place < count
    value = tl.load(source + place, mask=inside, other=0.0)
    tl.store(into + place // width * stride + place % width, value.to(into_like.dtype.element_ty), mask=inside)


@lru_cache(maxsize=4)
def _table(device: torch.device, rows: tuple[tuple[int, ...], ...]) -> Tensor:
    """Return where every matrix is, where it goes, its numbers, its width and its place's stride."""
    return torch.tensor(rows, dtype=torch.int64).to(device)


def copy_matrices(sources: Sequence[Tensor], into: Sequence[Tensor]) -> None:
    """Write each source (rows, width), contiguous, over a tensor of its shape whose rows are contiguous.

    Pairs of one dtype each, as a rule all, take one launch.
    """
    kinds: dict[tuple[torch.dtype, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
    for source, place in zip(sources, into, strict=True):
        kinds.setdefault((source.dtype, place.dtype), []).append((source, place))
    for pairs in kinds.values():
        rows = tuple((s.data_ptr(), p.data_ptr(), s.numel(), s.shape[1], p.stride(0)) for s, p in pairs)
        parts = triton.cdiv(max(source.numel() for source, _ in pairs), BLOCK)
        table = _table(pairs[0][0].device, rows)
        _copy_matrices[(len(rows), parts)](table, *pairs[0], BLOCK=BLOCK)
