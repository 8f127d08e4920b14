"""An optimiser step that changes nothing, where a scalar on the device says so."""

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from lightning_peft.optim.sharded import drop_gradients


def leaves_out_on_device(optimizer: Optimizer, device: torch.device) -> bool:
    """Return whether a step can be left out without the host knowing: the fused kernel reads the scalar itself."""
    return type(optimizer) is AdamW and all(
        group["fused"] and parameter.device == device
        for group in optimizer.param_groups
        for parameter in group["params"]
    )


def leave_out_if(is_wrong: Tensor, optimizer: Optimizer) -> None:
    """Have the step that follows leave parameters, moments and counts as they are where `is_wrong` () bool is true.

    The host waits for the scalar where `leaves_out_on_device` is false.
    """
    if leaves_out_on_device(optimizer, is_wrong.device):
        # torch's fused AdamW takes it from an AMP scaler by this name.
        optimizer.found_inf = is_wrong.float()  # type: ignore[attr-defined]
    elif bool(is_wrong):
        drop_gradients(optimizer)
