"""The operations between the products of a decoding step in bf16 on a CPU, one position a row, by kernels.

Each of torch's operators costs as much as a few thousand numbers do; a block has forty of them. Numbers are rounded
where transformers' modules round them.
"""

from ctypes import c_float, c_int, c_long

import torch
from torch import Tensor

from lightning_peft.kernels.native.library import AVX512_BF16, LANES, address, kernels, library

PAIRS, MOST_SIZE, TOGETHER = 32, 256, 4
"""A head's size is a multiple of the first, at most the second; so many queries go together, as decoding.cpp has it."""


def takes(x: Tensor) -> bool:
    """Return whether `rms_norm` and `gate_` take x (..., width): bf16 on the host, with nothing to be learnt."""
    plain = x.dtype is torch.bfloat16 and x.device.type == "cpu" and x.is_contiguous()
    return plain and x.shape[-1] % LANES == 0 and not torch.is_grad_enabled() and library(AVX512_BF16) is not None


def takes_heads(queries: Tensor, cache: Tensor) -> bool:
    """Return whether `attend` takes queries (..., size) and a cache."""
    size = queries.shape[-1]
    return takes(queries) and cache.dtype is torch.bfloat16 and size % PAIRS == 0 and size <= MOST_SIZE


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return weight x / sqrt(mean(x^2) + epsilon), (..., width), rounded before the weight."""
    assert weight.dtype is torch.bfloat16 and weight.is_contiguous()
    output, width = torch.empty_like(x), x.shape[-1]
    kernels(AVX512_BF16).rms_norm_bf16(
        address(x), address(weight), c_float(epsilon), c_long(x.numel() // width), c_long(width), address(output)
    )
    return output


def gate_(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) up, (..., width), written over the gate."""
    assert up.dtype is torch.bfloat16 and up.is_contiguous() and up.shape == gate.shape
    kernels(AVX512_BF16).gated_bf16(address(gate), address(up), c_long(gate.numel()))
    return gate


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, turn: tuple[Tensor, Tensor], lengths: Tensor, kept: Tensor,
    scaling: float,
) -> Tensor:  # fmt: skip
    """Return the attention of one position a row, (rows, heads of queries, size).

    queries (rows, heads of queries, size), keys and values (rows, heads, size) as the products made them; turn: cosine
    and sine (rows, size) of the rows' positions, the sine's first half negated; lengths (rows,), int64, are those
    positions. Keys and values go into kept (2, rows, heads, positions, size), of which each half is contiguous.
    """
    rows, heads, size = keys.shape
    width = kept.shape[3]
    cosine, sine = turn
    for tensor in (queries, keys, values, cosine, sine, lengths, *kept):
        assert tensor.is_contiguous()
    assert lengths.dtype is torch.int64 and cosine.dtype is sine.dtype is torch.bfloat16
    threads = min(torch.get_num_threads(), rows * heads)
    scores = queries.new_empty(threads, TOGETHER, -(-width // LANES) * LANES, dtype=torch.float32)
    mixed = torch.empty_like(queries)
    kernels(AVX512_BF16).attend_bf16(
        address(queries), address(keys), address(values), address(cosine), address(sine), address(lengths),
        c_long(rows), c_int(heads), c_int(queries.shape[1] // heads), c_int(size), c_long(width), c_float(scaling),
        address(kept[0]), address(kept[1]), address(mixed), address(scores), c_int(threads),
    )  # fmt: skip
    return mixed
