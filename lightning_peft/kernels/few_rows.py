"""Products of the few rows of a decoding step on a CPU, fp32 or bf16, by kernels that read each weight once.

The low-rank changes of many rows, those of prompts, are computed by the same in bf16.

torch's library reads the weights at a third of the memory's speed from four rows on, and takes 150 us for a change of
rank 16 in bf16. A row's numbers are the same beside any others: every output is one sum in one order.
"""

from collections.abc import Sequence
from ctypes import c_int, c_long, c_void_p
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_peft.kernels.native.library import AMX, AVX2, AVX512_BF16, Build, address, kernels, library

MOST_ROWS = 64
"""Rows up to which the kernel is at least as fast as torch's library, as few_rows_bf16.cpp has it."""
LANES = 8
"""fp32 numbers of a vector, as few_rows.cpp has it."""
PAIRS, TILE_ROWS = 32, 16
"""bf16 numbers of a row of a tile, and its rows, as few_rows_amx.cpp has them."""
BUILDS: dict[torch.dtype, Build] = {torch.float32: AVX2, torch.bfloat16: AVX512_BF16}


class FactorTable(NamedTuple):
    """Addresses of the factors of an adapter, one for each layer: whoever made it keeps the tensors."""

    A: "np.ndarray[tuple[int], np.dtype[np.uint64]]"
    B: "np.ndarray[tuple[int], np.dtype[np.uint64]]"
    ranks: "np.ndarray[tuple[int], np.dtype[np.int32]]"
    """0 for a layer that it leaves alone."""

    @classmethod
    def of(cls, pairs: Sequence[tuple[Tensor, Tensor] | None], dtype: torch.dtype) -> "FactorTable":
        """Return the table of each layer's A and B^T, contiguous on the host; None leaves a layer alone."""
        for factor in {id(factor): factor for pair in pairs if pair is not None for factor in pair}.values():
            assert is_plain(factor, dtype), f"the kernel reads contiguous {dtype} on the host, not {factor.dtype}"
        A, B = ([0 if pair is None else pair[side].data_ptr() for pair in pairs] for side in (0, 1))
        ranks = [0 if pair is None else pair[0].shape[0] for pair in pairs]  # len() of a tensor is slow
        return cls(np.array(A, np.uint64), np.array(B, np.uint64), np.array(ranks, np.int32))


class RowFactors(NamedTuple):
    """The low-rank pair of each row of a batch at a layer, by address: whoever made it keeps the tensors."""

    dtype: torch.dtype
    A: object
    """Addresses of (rank, in_features)."""
    B: object
    """Addresses of (rank, out_features)."""
    ranks: object
    """0 for a row without a pair."""
    most: int

    @classmethod
    def of(cls, pairs: Sequence[tuple[Tensor, Tensor] | None], dtype: torch.dtype) -> "RowFactors":
        """Return the pairs of each row's A and B^T at one layer; None leaves a row alone."""
        table = FactorTable.of(pairs, dtype)
        return cls._at(table, dtype, int(table.ranks.max(initial=0)))

    @classmethod
    def of_layers(cls, tables: Sequence[FactorTable | None], layers: int, dtype: torch.dtype) -> "list[RowFactors]":
        """Return the pairs of each row at each layer, from the table of each row; a row without one is left alone.

        A table may be of fewer layers: it was made before an adapter came that changes others too.
        """
        A, B = np.zeros((2, layers, len(tables)), np.uint64)
        ranks = np.zeros((layers, len(tables)), np.int32)
        for row, table in enumerate(tables):
            if table is not None:
                known = len(table.ranks)
                A[:known, row], B[:known, row], ranks[:known, row] = table
        most = ranks.max(1, initial=0).tolist()
        return [cls._at(FactorTable(*own), dtype, rank) for *own, rank in zip(A, B, ranks, most, strict=True)]

    @classmethod
    def _at(cls, rows: FactorTable, dtype: torch.dtype, most: int) -> "RowFactors":
        addresses, counts = c_void_p * len(rows.A), c_int * len(rows.A)
        A, B = addresses.from_buffer(rows.A.data), addresses.from_buffer(rows.B.data)
        return cls(dtype, A, B, counts.from_buffer(rows.ranks.data), most)


def is_plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Return whether a kernel can read a tensor by its address: contiguous numbers of a dtype on the host."""
    return tensor.dtype is dtype and tensor.device.type == "cpu" and tensor.is_contiguous()


def takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether `product` computes x W^T + bias: few rows of fp32 or bf16 on a CPU, with nothing to be learnt."""
    return x.dtype is weight.dtype and takes_rows(x) and reads(weight, bias)


def reads(weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether a kernel can read a weight (out_features, in_features) and its bias."""
    return fits(weight.dtype, *weight.shape) and all(x is None or is_plain(x, weight.dtype) for x in (weight, bias))


def fits(dtype: torch.dtype, in_features: int, out_features: int) -> bool:
    """Return whether the kernels of a dtype compute layers of such a shape."""
    return dtype is not torch.float32 or not (in_features % LANES or out_features % LANES)


def takes_rows(x: Tensor) -> bool:
    """Return whether a kernel takes x (rows, in_features)."""
    if x.ndim != 2 or not 0 < x.shape[0] <= MOST_ROWS or x.device.type != "cpu" or torch.is_grad_enabled():
        return False
    return x.dtype in BUILDS and library(BUILDS[x.dtype]) is not None


def product(x: Tensor, weight: Tensor, bias: Tensor | None, factors: RowFactors | None = None) -> Tensor:
    """Return x W^T + bias + (x A^T) B^T, (rows, out_features), each row by its own pair, where `takes` says so.

    In bf16 the change is added to the product's sums in fp32: rounded before, it would lose a young adapter.
    """
    rows, out_features = x.shape[0], weight.shape[0]  # len() of a tensor is slow
    x, output = x.contiguous(), x.new_empty(rows, out_features)
    shape = c_long(rows), c_long(x.shape[1]), c_long(out_features)
    if x.dtype is torch.float32:
        kernels(AVX2).few_rows_product(
            address(x), address(weight), address(bias), *shape, address(output), c_int(torch.get_num_threads())
        )
        return output if factors is None else add_low_rank(x, factors, output)
    A = B = ranks = None
    most = 0
    if factors is not None:
        assert factors.dtype is x.dtype, f"factors of {factors.dtype} beside rows of {x.dtype}"
        _, A, B, ranks, most = factors
    inner = x.new_empty(rows, most, dtype=torch.float32) if most else None
    rest = A, B, ranks, *shape, c_int(most), address(inner)
    given, threads = (address(x), address(weight), address(bias)), c_int(torch.get_num_threads())
    if takes_tiles(weight):
        packed = x.new_empty(-(-rows // TILE_ROWS) * TILE_ROWS, x.shape[1])
        kernels(AMX).few_rows_amx(*given, *rest, address(packed), address(output), threads)
    else:
        kernels(AVX512_BF16).few_rows_bf16(*given, *rest, address(output), threads)
    return output


def takes_tiles(weight: Tensor) -> bool:
    """Return whether tiles of AMX compute the products of a weight in bf16: its sides fill them."""
    return not (weight.shape[0] % PAIRS or weight.shape[1] % PAIRS) and library(AMX) is not None


def add_low_rank(x: Tensor, factors: RowFactors, output: Tensor) -> Tensor:
    """Add (x A^T) B^T to output (rows, out_features) in place: fp32, of widths that `fits`."""
    assert output.is_contiguous() and fits(x.dtype, x.shape[1], output.shape[1])
    assert output.dtype is factors.dtype is torch.float32
    if factors.most:
        x, inner = x.contiguous(), x.new_empty(len(x), factors.most)
        kernels(AVX2).few_rows_low_rank(
            address(x), factors.A, factors.B, factors.ranks, c_long(len(x)), c_long(x.shape[1]),
            c_long(output.shape[1]), c_int(factors.most), address(inner), address(output),
            c_int(torch.get_num_threads()),
        )  # fmt: skip
    return output


def takes_changes(x: Tensor) -> bool:
    """Return whether `changes` takes x (rows, ..., in_features): bf16 on a CPU, with nothing to be learnt."""
    plain = x.dtype is torch.bfloat16 and x.device.type == "cpu" and x.ndim > 1 and x.numel() > 0
    return plain and not torch.is_grad_enabled() and library(AVX512_BF16) is not None


def changes(x: Tensor, factors: RowFactors, out_features: int) -> Tensor:
    """Return (x A^T) B^T of each row by its own pair, (rows, ..., out_features), for x (rows, ..., in_features).

    Sums and inner products are fp32, and a change is rounded once. A row without a pair has zeros.
    """
    assert factors.dtype is x.dtype, f"factors of {factors.dtype} beside rows of {x.dtype}"
    x, output = x.contiguous(), x.new_empty(*x.shape[:-1], out_features)
    each = x.numel() // (x.shape[0] * x.shape[-1])
    inner = x.new_empty(x.shape[0] * each, factors.most, dtype=torch.float32)
    kernels(AVX512_BF16).changes_bf16(
        address(x), factors.A, factors.B, factors.ranks, c_long(x.shape[0]), c_long(each), c_long(x.shape[-1]),
        c_long(out_features), c_int(factors.most), address(inner), address(output), c_int(torch.get_num_threads()),
    )  # fmt: skip
    return output


def takes_cast(factors: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Return whether `cast` makes numbers of a dtype of these factors: bf16 of contiguous fp32 on the host."""
    return (
        dtype is torch.bfloat16
        and library(AVX512_BF16) is not None
        and all(is_plain(x, torch.float32) for x in factors)
    )


def cast(factors: Sequence[Tensor], scalings: Sequence[float], transposed: bool, into: Tensor) -> None:
    """Write scaling * factor (rank, width), fp32, of each into a tensor of bf16, one behind the other.

    With `transposed` each is the transpose of a contiguous matrix.
    """
    kernels(AVX512_BF16).cast_factors_bf16(
        *(
            own.ctypes.data_as(c_void_p)
            for own in (
                np.array([factor.data_ptr() for factor in factors], np.uint64),
                np.array(scalings, np.float32),
                *np.array([factor.shape for factor in factors], np.int32).reshape(-1, 2).T.copy(),
            )
        ),
        c_int(transposed), c_long(len(factors)), address(into),
    )  # fmt: skip
