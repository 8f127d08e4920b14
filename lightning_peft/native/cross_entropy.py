"""Cross entropy of logits and its gradient in one go, as an operator on the compiled kernel (cross_entropy.cpp)."""

from ctypes import c_int, c_long

import torch
from torch import Tensor

from lightning_peft.native.library import LANES, address, kernels, library

torch.library.define("lightning_peft::cross_entropy_gradient_", "(Tensor(a!) logits, Tensor labels) -> Tensor")


def takes(logits: Tensor) -> bool:
    """Whether there is a kernel for such logits on this machine."""
    suits = logits.dtype == torch.bfloat16 and logits.device.type == "cpu" and logits.shape[1] % LANES == 0
    return suits and library() is not None


@torch.library.impl("lightning_peft::cross_entropy_gradient_", "CPU")
def cross_entropy_gradient_(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of each row, (N,) fp32. logits (N, V) bf16 become its gradient; labels (N,) int64, below V."""
    assert logits.is_contiguous() and logits.dtype == torch.bfloat16 and labels.dtype == torch.int64
    rows, vocabulary = logits.shape
    if labels.amin() < 0 or labels.amax() >= vocabulary:
        raise IndexError(f"labels from {labels.amin()} to {labels.amax()}: must be in [0, {vocabulary})")
    labels = labels.contiguous()
    losses = logits.new_empty(rows, dtype=torch.float32)
    threads = c_int(torch.get_num_threads())
    kernels().cross_entropy_gradient(
        address(logits), address(labels), c_long(rows), c_long(vocabulary), address(losses), threads
    )
    return losses


@torch.library.register_fake("lightning_peft::cross_entropy_gradient_")
def _(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.new_empty(len(logits), dtype=torch.float32)
