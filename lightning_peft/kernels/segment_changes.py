"""The changes of several models, each on rows of its own, by one call of a compiled kernel (linear.cpp).

A segment takes some thirty calls of torch forward and backward, which cost more than what they compute where a batch is
short and the base's products are fast. Factors are cast, scaled and multiplied in there, and their gradients come out
in fp32. Numbers that are not finite stay in the rows of their own change.
"""

from collections.abc import Sequence
from ctypes import Array, Structure, c_float, c_int, c_long, c_void_p
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_peft.kernels.few_rows import is_plain
from lightning_peft.kernels.frozen_linear import GIVEN, Base, base_gradients, dense_weight
from lightning_peft.kernels.native.library import LANES, address, kernels, library
from lightning_peft.kernels.products import PANEL, add_product_, kernels_are_fastest

MOST_WORK = 6e6
"""Rows times rank times widths of a change, up to which calls of torch cost more than the tiles of AMX save. Ours."""


class ChangedRows(NamedTuple):
    """The rows of a change, and what its A is multiplied by."""

    start: int
    stop: int
    scaling: float


class NativeChange(Structure):
    """A change as linear.cpp has it: addresses of A and B, and what is beside them."""

    _fields_ = (
        ("A", c_void_p), ("B", c_void_p), ("scaling", c_float), ("rank", c_int), ("start", c_int), ("stop", c_int)
    )  # fmt: skip


def takes(base: Base, x: Tensor, rows: Sequence[ChangedRows], factors: Sequence[Tensor]) -> bool:
    """Return whether `add_changes` takes these: bf16 on a CPU, every row has a change, and torch would take longer."""
    if base.dtype is not torch.bfloat16 or x.dtype is not torch.bfloat16 or x.device.type != "cpu":
        return False
    if base.form == GIVEN or torch.compiler.is_compiling() or library() is None:
        return False
    in_features, out_features = x.shape[-1], factors[1].shape[0]
    counts, ranks = [stop - start for start, stop, _ in rows], [A.shape[0] for A in factors[::2]]
    multiplied = sum(count * rank for count, rank in zip(counts, ranks, strict=True))
    is_small = multiplied * (in_features + out_features) <= MOST_WORK * len(rows)
    return (
        (is_small or kernels_are_fastest())
        and not (in_features % LANES or out_features % LANES)
        and sum(counts) == x.numel() // in_features
        and max(ranks) <= PANEL
        and all(is_plain(factor, torch.float32) for factor in factors)
        and any(A.requires_grad for A in factors[::2])
    )


def add_changes(base: Base, x: Tensor, rows: Sequence[ChangedRows], factors: Sequence[Tensor]) -> Tensor:
    """Return what `add_segments` does, where `takes` says so; factors has A and B of each in turn."""
    return SegmentChanges.apply(base.first, x, tuple(rows), len(factors), *factors, *base.rest())


class SegmentChanges(torch.autograd.Function):
    """base + scaling * x A^T B^T on the rows of each change. Saves x, and inner = scaling * x A^T, of all."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, x: Tensor, rows: tuple[ChangedRows, ...], count: int, *rest: Any) -> Tensor:
        factors, base = rest[:count], Base.of(first, rest[count:])
        weight, bias = dense_weight(base), base.tensors[-1]
        call = Call(rows, factors)
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        output = flat.new_empty(len(flat), call.out_features)
        inner = flat.new_empty(call.places[-1])
        kernels().segment_changes(
            address(flat), call.changes, call.starts, c_int(len(rows)), c_int(call.in_features),
            c_int(call.out_features), address(inner), address(output), *call.room(flat), c_int(call.threads),
        )  # fmt: skip
        # In 16 bits the changes come first: see `low_rank_sum`.
        add_product_(flat, weight, None if bias is None else bias.to(base.dtype), output)
        ctx.save_for_backward(x, inner, *factors, *base.kept())
        ctx.base, ctx.rows, ctx.count = base._replace(tensors=()), rows, count
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, inner, *saved = ctx.saved_tensors
        factors, frozen = saved[: ctx.count], saved[ctx.count :]
        base = ctx.base._replace(tensors=tuple(frozen))
        call = Call(ctx.rows, factors)
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        grad_rows = grad.reshape(-1, grad.shape[-1]).contiguous()
        of_factors = [torch.empty_like(factor) for factor in factors]
        grad_x, grad_inner = torch.empty_like(flat), torch.empty_like(inner)
        sums = flat.new_empty(call.threads, call.padded * (call.in_features + call.out_features), dtype=torch.float32)
        kernels().segment_gradients(
            address(grad_rows), address(flat), address(inner), call.changes, call.starts, c_int(len(ctx.rows)),
            c_int(call.in_features), c_int(call.out_features), address(grad_inner), addresses(of_factors[::2]),
            addresses(of_factors[1::2]), address(grad_x), *call.room(flat), address(sums), c_int(call.padded),
            c_int(call.threads),
        )  # fmt: skip
        if ctx.needs_input_grad[1]:
            add_product_(grad_rows, dense_weight(base), None, grad_x, transposed=False)
        needed = ctx.needs_input_grad[4 : 4 + ctx.count]
        own = (found if needs else None for found, needs in zip(of_factors, needed, strict=True))
        grad_first, grad_rest = base_gradients(grad, base, ctx.needs_input_grad)
        into_x = grad_x.view(x.shape) if ctx.needs_input_grad[1] else None
        return grad_first, into_x, None, None, *own, *grad_rest


class Call:
    """Arguments of both kernels: the changes, and memory to compute them in."""

    def __init__(self, rows: Sequence[ChangedRows], factors: Sequence[Tensor]):
        A, B = factors[::2], factors[1::2]
        self.in_features, self.out_features = A[0].shape[1], B[0].shape[0]
        ranks = [factor.shape[0] for factor in A]
        self.changes = (NativeChange * len(rows))(
            *(
                NativeChange(a.data_ptr(), b.data_ptr(), own.scaling, rank, own.start, own.stop)
                for a, b, rank, own in zip(A, B, ranks, rows, strict=True)
            )
        )
        even = [rank + rank % 2 for rank in ranks]
        self.places = [0, *accumulate((own.stop - own.start) * rank for own, rank in zip(rows, even, strict=True))]
        """Places at which the inner products of each change begin, and at which the last one's end."""
        self.starts = (c_long * len(self.places))(*self.places)
        self.most = max(even)
        self.padded = -(-self.most // LANES) * LANES
        self.threads = torch.get_num_threads()

    def room(self, like: Tensor) -> tuple[c_void_p, c_long]:
        """Return memory for each thread: both factors cast, a panel, and one factor paired."""
        paired = max(self.in_features * PANEL, self.out_features * self.padded)
        size = self.most * (self.in_features + self.out_features + PANEL) + paired
        self.kept = like.new_empty(self.threads, size)
        return address(self.kept), c_long(size)


def addresses(tensors: Sequence[Tensor]) -> "Array[c_void_p]":
    return (c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
