"""The way torch's allocator takes the memory of a GPU, decided before CUDA starts."""

import os

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Variables by which somebody has decided."""


def let_segments_grow() -> None:
    """Have segments of memory grow instead of being cut anew for each width of a batch, unless the user has decided.

    Batches of many widths leave holes that nothing fits into: a card runs out of memory with gigabytes free.
    """
    if not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"
