"""The compiled attention kernel (native/attention.cpp) on torch's tensors."""

import ctypes
from ctypes import byref, c_float, c_int, c_long, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_peft.kernels.attention.grouping import SampleBounds
from lightning_peft.kernels.native.library import LANES, Scratch, address, kernels, library

NO_WINDOW = 2**30


class View(ctypes.Structure):
    """A (B, H, T, D) tensor whose last dimension is contiguous."""

    _fields_ = [("data", c_void_p), ("batch", c_long), ("head", c_long), ("token", c_long)]


class Work(ctypes.Structure):
    """The work that the threads of one call share."""

    _fields_ = [
        ("samples", c_void_p), ("num_samples", c_int), ("row_width", c_int), ("heads", c_int), ("key_heads", c_int),
        ("parts", c_int), ("head_dim", c_int), ("window", c_int), ("scaling", c_float), ("scratch", c_void_p),
        ("scratch_bytes", c_long), ("threads", c_int),
    ]  # fmt: skip


class Split(NamedTuple):
    """The division of a call's heads among threads."""

    parts: int
    """Parts that the query heads of one key head are cut into: 1, or one each where samples alone keep too few busy."""
    threads: int


def takes(query: Tensor) -> bool:
    """Return whether the kernel computes attention of these heads on this machine; compile it if need be."""
    return query.dtype == torch.bfloat16 and query.shape[-1] % LANES == 0 and library() is not None


def split(num_samples: int, heads: int, key_heads: int) -> Split:
    """Return the division of the heads. Samples are taken as they come: with four for a thread, none waits long."""
    threads = torch.get_num_threads()
    parts = heads // key_heads if num_samples * key_heads < 4 * threads else 1
    return Split(parts, min(threads, num_samples * key_heads * parts))


def scratch(query: Tensor, key: Tensor, backward: bool) -> Scratch:
    """Return what a call holds for a moment, beside its result, where each row is one sample."""
    rows, heads, width, head_dim = query.shape
    parts, threads = split(rows, heads, key.shape[1])
    partial = [((rows, width, key.shape[1] * parts, head_dim), query.dtype)] * 2 if backward and parts > 1 else []
    return [((threads, _scratch_bytes(width, head_dim, backward)), torch.uint8), *partial]


def attend(
    query: Tensor, key: Tensor, value: Tensor, samples: list[SampleBounds], scaling: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """Return the output (B, T, H, D) and log normalisers (B, T, H) fp32.

    query (B, H, T, D), key and value (B, G, T, D), bf16.
    """
    rows, heads, width, head_dim = query.shape
    output = query.new_empty(rows, width, heads, head_dim)
    normalizers = query.new_empty(rows, width, heads, dtype=torch.float32)
    shared = split(len(samples), heads, key.shape[1])
    views = (query, key, value, output.transpose(1, 2))
    _call("attention", query, key, samples, scaling, window, shared, views, normalizers)
    return output, normalizers


def attend_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    normalizers: Tensor,
    samples: list[SampleBounds],
    scaling: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value from the output's (B, T, H, D) and from what `attend` gave."""
    rows, heads, width, head_dim = query.shape
    key_heads = key.shape[1]
    shared = split(len(samples), heads, key_heads)
    grad_query = query.new_empty(rows, width, heads, head_dim).transpose(1, 2)
    grad_key, grad_value = (query.new_empty(rows, width, key_heads * shared.parts, head_dim) for _ in range(2))
    views = (
        grad_output.transpose(1, 2), query, key, value, output.transpose(1, 2),
        grad_query, grad_key.transpose(1, 2), grad_value.transpose(1, 2),
    )  # fmt: skip
    _call("attention_backward", query, key, samples, scaling, window, shared, views, normalizers)
    if shared.parts > 1:
        grad_key, grad_value = (x.unflatten(2, (key_heads, shared.parts)).sum(3) for x in (grad_key, grad_value))
    return grad_query, grad_key.transpose(1, 2), grad_value.transpose(1, 2)


def _call(
    function: str,
    query: Tensor,
    key: Tensor,
    samples: list[SampleBounds],
    scaling: float,
    window: int | None,
    shared: Split,
    views: tuple[Tensor, ...],
    normalizers: Tensor,
) -> None:
    _, heads, width, head_dim = query.shape
    # Long ones first: the last to be taken are short.
    by_length = sorted(((start, stop - start) for start, stop in samples), key=lambda sample: -sample[1])
    listed = (c_int * (2 * len(samples)))(*(number for sample in by_length for number in sample))
    scratch_bytes = _scratch_bytes(by_length[0][1], head_dim, function == "attention_backward")
    memory = query.new_empty(shared.threads * scratch_bytes, dtype=torch.uint8)
    work = Work(
        ctypes.addressof(listed), len(samples), width, heads, key.shape[1], shared.parts, head_dim,
        NO_WINDOW if window is None else window, scaling, memory.data_ptr(), scratch_bytes, shared.threads,
    )  # fmt: skip
    assert all(x.dtype == torch.bfloat16 for x in views)
    assert normalizers.is_contiguous() and normalizers.dtype == torch.float32
    views = tuple(x if x.stride(-1) == 1 else x.contiguous() for x in views)
    structures = (View * len(views))(*(View(x.data_ptr(), *x.stride()[:3]) for x in views))
    kernels()[function](byref(work), structures, address(normalizers))


def _scratch_bytes(length: int, head_dim: int, backward: bool) -> int:
    """Return the bytes of scratch that one thread takes for samples of this length."""
    scratch_of = kernels().attention_scratch
    scratch_of.restype = c_long
    return int(scratch_of(length, head_dim, int(backward)))
