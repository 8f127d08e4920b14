"""Row norms of a weight with a low-rank change, as an operator of CUDA: one launch that reads the weight once."""

import torch
from torch import Tensor

from lightning_peft.kernels.codes import has_triton

torch.library.define("lightning_peft::row_norms", "(Tensor weight, Tensor A, Tensor B, float scaling) -> Tensor")


def takes_norms(weight: Tensor) -> bool:
    """Return whether `row_norms` has a kernel for this weight."""
    return weight.is_cuda and torch.version.hip is None and has_triton()


@torch.library.impl("lightning_peft::row_norms", "CUDA")
def _row_norms(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    from lightning_peft.kernels.triton_norms import row_norms

    return row_norms(weight, A, B, scaling)


@torch.library.register_fake("lightning_peft::row_norms")
def _(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return A.new_empty(weight.shape[0], dtype=torch.float32)
