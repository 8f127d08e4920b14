"""Products of rows sorted by expert with each expert's own frozen matrix, and a low-rank change beside it.

An expert is computed on its rows alone, by the kernels of a linear layer: no change of all experts is ever formed, and
of coded weights one expert's is dense at a time.
"""

from collections.abc import Callable, Sequence
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lightning_peft.kernels.codes import CodedMatmul
from lightning_peft.kernels.frozen_linear import DENSE, Base, given
from lightning_peft.kernels.low_rank import add_low_rank


def rows_per_expert(expert_ids: Tensor, experts: int) -> list[int]:
    """Return how many of the ids (N,) name each expert; as many for each where they have no values, in the planner."""
    if isinstance(expert_ids, FakeTensor):
        share, rest = divmod(expert_ids.numel(), experts)
        return [share + (expert < rest) for expert in range(experts)]
    return torch.bincount(expert_ids, minlength=experts).tolist()


def grouped_product(
    x: Tensor,
    sizes: Sequence[int],
    base_of: Callable[[int], Base],
    factors: tuple[Tensor, Tensor] | None = None,
    scaling: float = 1.0,
    dropout: float = 0.0,
) -> Tensor:
    """Return x_e W_e^T + scaling * dropout(x_e) A_e^T B_e^T over the experts e, (N, out_features).

    x (N, in_features) has the rows of expert 0 first, `sizes[0]` of them, then those of expert 1, and so on. `base_of`
    gives an expert's frozen matrix; factors are A (experts, rank, in_features) and B (experts, out_features, rank).
    """
    # Unbound rather than indexed: the gradients of all experts are then put together once.
    pairs = repeat(None) if factors is None else zip(factors[0].unbind(), factors[1].unbind(), strict=True)
    outputs = [
        _product(rows, base_of(expert), pair, scaling, dropout)
        for expert, (rows, pair) in enumerate(zip(x.split(list(sizes)), pairs, strict=factors is not None))
        if len(rows) or expert == 0  # no rows at all are a product too
    ]
    return torch.cat(outputs)


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
