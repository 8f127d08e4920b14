"""The memory that a training step on a CPU takes and frees: a heap for tensors, and the C library's settings."""

import ctypes
import logging
import os
import platform
import resource
from functools import cache
from pathlib import Path

import torch

from lightning_peft.kernels.native.library import Build, library

logger = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Parameters of glibc's mallopt (malloc.h)."""
NEVER = -1
LARGEST_FROM_HEAP = 2**25
"""Bytes above which an allocation is mapped on its own; the most to which glibc raises its own threshold."""
SETTINGS = (
    "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES",
    "LD_PRELOAD",
)  # fmt: skip
"""Environment variables by which a user sets this, or another allocator."""

SMALLEST_OF_HEAP = 2**14
"""Bytes from which a tensor lies in the heap for tensors. Ours: smaller ones are many and take little."""
OF_TORCH = Path(torch.__file__).parent
TENSOR_HEAP = Build(
    ("tensor_heap.cpp",),
    (),
    (),
    "tensors lie in the C library's heap, where a step on a CPU may hold half as much memory again",
    lambda: platform.libc_ver()[0] == "glibc",
    (
        "-std=c++20", "-fexceptions", "-frtti", "-w", f"-I{OF_TORCH / 'include'}", f"-L{OF_TORCH / 'lib'}", "-lc10",
        "-lstdc++", "-lgcc_s", f"-DTORCH_VERSION={torch.__version__}",
    ),
)  # fmt: skip
"""The heap's library: it is of the torch whose headers it is made with."""


@cache
def may_be_set() -> bool:
    """Return whether the C library is glibc and the user has set nothing of it; if not, one line says why."""
    if platform.libc_ver()[0] != "glibc":
        reason = "the C library is not glibc"
    elif found := [name for name in SETTINGS if os.environ.get(name)]:
        reason = f"{found[0]} is set, which is left as it is"
    else:
        return True
    logger.info(
        "memory is taken and freed as the C library does it, and a step may hold half as much again: %s", reason
    )
    return False


def share_heap() -> bool:
    """Let threads that work one at a time take memory from one heap; return whether they do.

    By default each has a heap of its own, and what one has freed is lost to the others.
    """
    return may_be_set() and bool(ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1))


def keep_freed_memory() -> bool:
    """Let glibc keep what a step frees for the next one; return whether it does.

    By default it returns free memory to the kernel, which clears every page anew when the next step asks for it: a
    tenth of a step (SmolLM2-135M, 4x512 tokens, two cores). A user's own settings and other C libraries are left alone.
    """
    if not may_be_set():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    kept = bool(mallopt(M_MMAP_THRESHOLD, LARGEST_FROM_HEAP)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))
    logger.debug("host memory that a step frees is kept for the next one: %s", kept)
    return kept


def use_tensor_heap() -> bool:
    """Let tensors that are made from now on lie in a heap of their own; return whether they do.

    In glibc's, what a step frees is hardly ever taken by the next tensor of the same size: the holes are as large as
    half of what it holds. A user's own settings and other C libraries are left alone.
    """
    return may_be_set() and (heap := library(TENSOR_HEAP)) is not None and has_room(heap)


@cache
def has_room(heap: ctypes.CDLL) -> bool:
    """Return whether the heap has addresses of its own; it asks for them once, and one line says why it has none."""
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        reason = "its addresses would be most of those that this process may have (ulimit -v)"
    elif heap.use_tensor_heap(*map(ctypes.c_size_t, (room, SMALLEST_OF_HEAP, LARGEST_FROM_HEAP))):
        return True
    else:
        reason = f"the system refuses {room} addresses"
    logger.warning("%s: %s", TENSOR_HEAP.without, reason)
    return False
