"""Products of rows sorted by expert with each expert's own frozen matrix, and a low-rank change beside it.

An expert is computed on its rows alone, by the kernels of a linear layer: no change of all experts is ever formed, and
of coded weights one expert's is dense at a time. Where the device has a kernel for all experts of a dense stack at
once, that one is taken, and the host does not wait to know which expert has how many rows.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import repeat
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lightning_peft.kernels.codes import CodedMatmul
from lightning_peft.kernels.frozen_linear import DENSE, Base, given
from lightning_peft.kernels.low_rank import add_low_rank

ALIGNED = 8
"""Numbers of 16 bits in the 16 bytes that the grouped kernel wants rows to be a multiple of."""


class RowsPerExpert(Sequence[int]):
    """The number of sorted ids that name each expert. Reading a number waits for the device; `ends` does not."""

    def __init__(self, sorted_ids: Tensor, experts: int):
        """Take sorted_ids (N,) int64, ascending."""
        self.sorted_ids = sorted_ids
        self.experts = experts

    @cached_property
    def ends(self) -> Tensor:
        """Return where the rows of each expert end, (experts,) int32 on the ids' device."""
        experts = torch.arange(self.experts, device=self.sorted_ids.device)
        return torch.searchsorted(self.sorted_ids, experts, right=True, out_int32=True)

    @cached_property
    def sizes(self) -> list[int]:
        """Return the numbers on the host; as many for each where ids have no values, in the planner."""
        if isinstance(self.sorted_ids, FakeTensor):
            share, rest = divmod(self.sorted_ids.numel(), self.experts)
            return [share + (expert < rest) for expert in range(self.experts)]
        ends = self.ends.tolist()
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]

    def __len__(self) -> int:
        return self.experts

    @overload
    def __getitem__(self, expert: int) -> int: ...
    @overload
    def __getitem__(self, expert: slice) -> list[int]: ...
    def __getitem__(self, expert: int | slice) -> int | list[int]:
        return self.sizes[expert]


def grouped_product(
    x: Tensor,
    sizes: Sequence[int],
    base_of: Callable[[int], Base],
    factors: tuple[Tensor, Tensor] | None = None,
    scaling: float = 1.0,
    dropout: float = 0.0,
    stack: Tensor | None = None,
) -> Tensor:
    """Return x_e W_e^T + scaling * dropout(x_e) A_e^T B_e^T over the experts e, (N, out_features).

    x (N, in_features) has the rows of expert 0 first, `sizes[0]` of them, then those of expert 1, and so on. `base_of`
    gives an expert's frozen matrix; factors are A (experts, rank, in_features) and B (experts, out_features, rank).
    `stack` are all matrices, (experts, out_features, in_features), where they are dense.
    """
    if stack is not None and isinstance(sizes, RowsPerExpert) and runs_at_once(x, stack, base_of(0).dtype):
        return product_at_once(x, sizes.ends, stack.to(base_of(0).dtype), factors, scaling, dropout)
    # The factors are unbound rather than indexed: the gradients of all experts are then put together once.
    pairs = repeat(None) if factors is None else zip(factors[0].unbind(), factors[1].unbind(), strict=True)
    outputs = [
        _product(rows, base_of(expert), pair, scaling, dropout)
        for expert, (rows, pair) in enumerate(zip(x.split(list(sizes)), pairs, strict=factors is not None))
        if len(rows) or expert == 0  # no rows at all are a product too
    ]
    return torch.cat(outputs)


def runs_at_once(x: Tensor, stack: Tensor, dtype: torch.dtype) -> bool:
    """Return whether the device multiplies all experts at once: bf16 on Hopper and later; others split on the host."""
    if not x.is_cuda or isinstance(x, FakeTensor) or not len(x) or dtype is not torch.bfloat16:
        return False
    is_aligned = stack.shape[1] % ALIGNED == 0 and stack.shape[2] % ALIGNED == 0
    return is_aligned and torch.cuda.get_device_capability(x.device) >= (9, 0)


def product_at_once(
    x: Tensor,
    ends: Tensor,
    stack: Tensor,
    factors: tuple[Tensor, Tensor] | None = None,
    scaling: float = 1.0,
    dropout: float = 0.0,
) -> Tensor:
    """Return what `grouped_product` does, in the stack's dtype, by torch's grouped products; `ends` as of the rows."""
    cast = x.to(stack.dtype)
    output = torch._grouped_mm(cast, stack.mT, offs=ends)
    if factors is None:
        return output
    # Any rank will do: rows of zeros change nothing.
    missing = -factors[0].shape[1] % ALIGNED
    A = F.pad((scaling * factors[0]).to(stack.dtype), (0, 0, 0, missing))
    B = F.pad(factors[1].to(stack.dtype), (0, missing))
    inner = torch._grouped_mm(F.dropout(cast, dropout) if dropout else cast, A.mT, offs=ends)
    return output + torch._grouped_mm(inner, B.mT, offs=ends)


def _product(x: Tensor, base: Base, pair: tuple[Tensor, Tensor] | None, scaling: float, dropout: float) -> Tensor:
    if pair is not None:
        output = add_low_rank(base, x, *pair, scaling, dropout)
        if output is not None:
            return output
        changed = add_low_rank(given(_frozen(x, base)), x, *pair, scaling, dropout)
        assert changed is not None, "over a given base dropout is drawn beforehand"
        return changed
    return _frozen(x, base)


def _frozen(x: Tensor, base: Base) -> Tensor:
    cast = x.to(base.dtype)
    if base.form == DENSE:
        return F.linear(cast, base.first.to(base.dtype))
    return CodedMatmul.apply(cast, *base.tensors, base.form, base.block_size)
