"""How much memory a device has for a run."""

import os

import torch

GIB = 2**30
RESERVED = {"cpu": 0.5 * GIB, "cuda": 0.75 * GIB}
"""What an estimate leaves out: the interpreter and its libraries; the CUDA context and gaps between allocations."""


def device_memory(accelerator: str, named_gib: float | None) -> float | None:
    """Bytes of the named device, else of this machine's; None for a GPU that is not here."""
    if named_gib is not None:
        return named_gib * GIB
    if accelerator == "cpu":
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return float(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None


def usable_memory(accelerator: str, named_gib: float | None) -> float | None:
    """`device_memory` less `RESERVED`."""
    total = device_memory(accelerator, named_gib)
    return None if total is None else total - RESERVED[accelerator]
