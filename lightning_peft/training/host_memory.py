"""The C library's treatment of memory that a training step on a CPU has freed."""

import ctypes
import logging
import os
import platform

logger = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt (malloc.h)."""
NEVER = -1
LARGEST_FROM_HEAP = 2**25
"""Bytes above which an allocation is mapped on its own; the most to which glibc raises its own threshold."""
SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES", "LD_PRELOAD")
"""Environment variables by which a user sets this, or another allocator."""


def keep_freed_memory() -> bool:
    """Let glibc keep what a step frees for the next one; return whether it does.

    By default it returns free memory to the kernel, which clears every page anew when the next step asks for it: a
    tenth of a step (SmolLM2-135M, 4x512 tokens, two cores). A user's own settings and other C libraries are left alone.
    """
    if platform.libc_ver()[0] != "glibc" or any(os.environ.get(name) for name in SETTINGS):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    kept = bool(mallopt(M_MMAP_THRESHOLD, LARGEST_FROM_HEAP)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))
    logger.debug("host memory that a step frees is kept for the next one: %s", kept)
    return kept
