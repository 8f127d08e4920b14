"""Watches a training step on fake tensors: which storages live when, how many FLOPs and bytes each part takes."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lightning_peft.kernels import (  # noqa: F401  registers the operators
    codes,
    cross_entropy,
    inside_product,
    products,
    row_norms,
    shared_input,
)
from lightning_peft.kernels.attention import operator
from lightning_peft.kernels.native.library import Scratch


class Array(NamedTuple):
    """The shape and dtype of a storage, as the operator that made it gave them."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


OPENED = {
    torch.ops.lightning_peft.coded_matmul.default,
    torch.ops.lightning_peft.dequantize.default,
    torch.ops.lightning_peft.scaled_products.default,
    torch.ops.lightning_peft.factor_gradient.default,
    torch.ops.lightning_peft.output_gradients.default,
    torch.ops.lightning_peft.shared_input_gradient.default,
    torch.ops.lightning_peft.wide_rows.default,
    torch.ops.lightning_peft.fill_edge.default,
    torch.ops.lightning_peft.inside_products.default,
    torch.ops.lightning_peft.fill_gradient_edge.default,
    torch.ops.lightning_peft.inside_gradient.default,
}
"""Operators of ours that are followed inside, being written in operators that have fake forms."""


def _whole(like: Tensor) -> Scratch:
    return [(tuple(like.shape), like.dtype)]


def _attention_scratch(query: Tensor, key: Tensor, backward: bool) -> Scratch:
    scratch: Scratch = operator.implementation(query).scratch(query, key, backward)
    return scratch


SCRATCH: dict[Any, Callable[..., Scratch]] = {
    torch.ops.aten.logsumexp.default: lambda x, *_: _whole(x),
    torch.ops.lightning_peft.sample_attention.default: lambda q, k, *_: _attention_scratch(q, k, False),
    torch.ops.lightning_peft.sample_attention_backward.default: lambda _, q, k, *__: _attention_scratch(q, k, True),
    torch.ops.lightning_peft.low_rank_sum.default: products.sum_scratch,
    torch.ops.lightning_peft.low_rank_gradients.default: products.gradients_scratch,
    torch.ops.lightning_peft.column_dots.default: products.columns_scratch,
    torch.ops.lightning_peft.cross_entropy_gradient_.default: lambda *_: [],
    torch.ops.lightning_peft.decode.default: lambda *_: [],
    torch.ops.lightning_peft.read_once.default: lambda *_, **__: [],
    torch.ops.lightning_peft.add_up.default: lambda *_: [],
    torch.ops.lightning_peft.row_norms.default: lambda *_: [],
    torch.ops.lightning_peft.copy_matrices.default: lambda *_: [],
}
"""Arrays that operators that cannot be followed inside hold while they run, beside inputs and outputs."""


def _attention_flops(query: Tensor, key: Tensor, *_: Any, **options: Any) -> int:
    rows, heads, width, head_dim = query.shape
    return 2 * 2 * rows * heads * width * key.shape[2] * head_dim


def _attention_backward_flops(grad: Tensor, query: Tensor, key: Tensor, *_: Any, **options: Any) -> int:
    return _attention_flops(query, key) * 5 // 2  # five products instead of two: the scores are computed again


def _sum_flops(x: Tensor, weight: Tensor, inner: Tensor, factor: Tensor, *_: Any) -> int:
    return 2 * inner.shape[0] * (weight.numel() + factor.numel())


def _factor_flops(grad: Tensor, x: Tensor, inner: Tensor, B: Tensor) -> int:
    return 2 * inner.numel() * (2 * grad.shape[1] + x.shape[1])


FLOPS: dict[Any, Callable[..., int]] = {
    torch.ops.aten.addmm_.default: lambda _, a, b, **options: 2 * a.shape[0] * a.shape[1] * b.shape[1],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention_backward_flops,
    torch.ops.lightning_peft.sample_attention.default: _attention_flops,
    torch.ops.lightning_peft.sample_attention_backward.default: _attention_backward_flops,
    torch.ops.lightning_peft.low_rank_sum.default: _sum_flops,
    torch.ops.lightning_peft.low_rank_gradients.default: _factor_flops,
}
"""FLOPs of operators torch has no formula for. The full square is counted, as torch does for causal attention."""


SCRATCH_STORAGE = -1
"""The number of all memory that an operator holds only while it runs."""


class Event(NamedTuple):
    """One storage appeared (+1) or went (-1)."""

    change: int
    storage: int
    array: Array


@dataclass
class RecordedSegment:
    """The events between two marks."""

    name: str
    events: list[Event] = field(default_factory=list)
    flops: int = 0
    bytes_moved: int = 0


class Recorder(TorchDispatchMode):
    """Records into segments, from `mark` to `mark`. Storages passed to `ignore` beforehand are not recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.segments: list[RecordedSegment] = []
        self.alive: dict[int, weakref.ref[Any]] = {}
        self.numbers: dict[int, int] = {}
        self.count = 0
        self.is_recording = False

    def mark(self, name: str) -> None:
        """Begin a segment."""
        self.segments.append(RecordedSegment(name))

    def ignore(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.alive[id(storage)] = weakref.ref(storage)

    def number(self, tensor: Tensor) -> int | None:
        """Return the number of a recorded tensor's storage; None for an ignored one."""
        return self.numbers.get(id(tensor.untyped_storage()))

    @contextmanager
    def recording(self) -> Iterator[None]:
        self.is_recording = True
        try:
            with self:
                yield
        finally:
            self.is_recording = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in OPENED:
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        output = func(*args, **kwargs)
        made = [self.see(t) for t in tree_leaves(output) if isinstance(t, Tensor)]
        segment = self.segments[-1]
        scratch = [Array(*array) for array in SCRATCH[func](*args)] if func in SCRATCH else []
        for change in (1, -1):
            segment.events += [Event(change, SCRATCH_STORAGE, array) for array in scratch]
        if func in FLOPS:
            segment.flops += FLOPS[func](*args, **kwargs)
        elif (formula := flop_registry.get(func._overloadpacket)) is not None:
            segment.flops += formula(*args, **kwargs, out_val=output)
        if any(made) or func._schema.is_mutable:
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            tensors += [t for t in tree_leaves(output) if isinstance(t, Tensor)]
            segment.bytes_moved += sum(t.numel() * t.itemsize for t in tensors)
        return output

    def see(self, tensor: Tensor) -> bool:
        """Return whether the tensor's storage is new; it is then followed until it goes."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self.alive:
            return False
        array = Array(tuple(tensor.shape), tensor.dtype)
        if array.nbytes != storage.nbytes():
            array = Array((storage.nbytes(),), torch.uint8)
        self.count += 1
        number = self.count
        self.numbers[key] = number

        def gone(_: Any) -> None:
            del self.alive[key], self.numbers[key]
            if self.is_recording:
                self.segments[-1].events.append(Event(-1, number, array))

        self.alive[key] = weakref.ref(storage, gone)
        self.segments[-1].events.append(Event(1, number, array))
        return True

    def living(self) -> set[int]:
        """Return the numbers of the storages that are there now."""
        return set(self.numbers.values())


Held = Counter[tuple[str, Array]]
"""The number of storages of each component, shape and dtype."""


def held_bytes(held: Held) -> int:
    return sum(count * array.nbytes for (_, array), count in held.items())
