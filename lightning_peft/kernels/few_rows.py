"""Products of the few rows of a decoding step on a CPU, fp32, by kernels that read each weight once.

torch's library reads the weights at a third of the memory's speed from four rows on. A row's numbers are the same
beside any others: every output is one sum in one order.
"""

from collections.abc import Sequence
from ctypes import c_int, c_long, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_peft.kernels.native.library import FEW_ROWS, address, kernels, library

MOST_ROWS = 64
"""Rows up to which the kernel is at least as fast as torch's library."""
LANES = 8
"""fp32 numbers of a vector, as few_rows.cpp has it."""


class RowFactors(NamedTuple):
    """The low-rank pair of each row of a batch, by address: whoever made it keeps the tensors."""

    A: object
    """Addresses of fp32 (rank, in_features)."""
    B: object
    """Addresses of fp32 (rank, out_features)."""
    ranks: object
    """0 for a row without a pair."""
    most: int

    @classmethod
    def of(cls, pairs: Sequence[tuple[Tensor, Tensor] | None]) -> "RowFactors":
        """Return them for each row's A and B^T, contiguous fp32 on the host; None leaves a row alone."""
        for factor in {id(factor): factor for pair in pairs if pair is not None for factor in pair}.values():
            assert is_plain(factor), f"the kernel reads contiguous fp32 on the host, not {factor.dtype}"
        ranks = [0 if pair is None else len(pair[0]) for pair in pairs]
        A, B = ([None if pair is None else pair[side].data_ptr() for pair in pairs] for side in (0, 1))
        addresses = c_void_p * len(pairs)
        return cls(addresses(*A), addresses(*B), (c_int * len(pairs))(*ranks), max(ranks, default=0))


def is_plain(tensor: Tensor) -> bool:
    """Return whether a kernel can read a tensor by its address: contiguous fp32 on the host."""
    return tensor.dtype is torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous()


def takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether `product` computes x W^T + bias: few rows of fp32 on a CPU, and nothing to be learnt from them."""
    return takes_rows(x, len(weight)) and is_plain(weight) and (bias is None or is_plain(bias))


def takes_rows(x: Tensor, out_features: int) -> bool:
    """Return whether `add_low_rank` takes x (rows, in_features) and an output of so many features."""
    fits = x.ndim == 2 and 0 < len(x) <= MOST_ROWS and x.shape[1] % LANES == 0 and out_features % LANES == 0
    plain = x.dtype is torch.float32 and x.device.type == "cpu" and not torch.is_grad_enabled()
    return fits and plain and library(FEW_ROWS) is not None


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + bias, (rows, out_features), where `takes` says so."""
    x, output = x.contiguous(), x.new_empty(len(x), len(weight))
    kernels(FEW_ROWS).few_rows_product(
        address(x), address(weight), address(bias), c_long(len(x)), c_long(x.shape[1]), c_long(len(weight)),
        address(output), c_int(torch.get_num_threads()),
    )  # fmt: skip
    return output


def add_low_rank(x: Tensor, factors: RowFactors, output: Tensor) -> Tensor:
    """Add (x A^T) B^T to output (rows, out_features) in place, each row by its own pair, where `takes_rows` says so."""
    assert output.is_contiguous() and output.dtype is torch.float32
    if factors.most:
        x, inner = x.contiguous(), x.new_empty(len(x), factors.most)
        kernels(FEW_ROWS).few_rows_low_rank(
            address(x), factors.A, factors.B, factors.ranks, c_long(len(x)), c_long(x.shape[1]),
            c_long(output.shape[1]), c_int(factors.most), address(inner), address(output),
            c_int(torch.get_num_threads()),
        )  # fmt: skip
    return output
