"""The fastest causal attention over packed samples here: forward and backward, SmolLM2-135M's heads.

    python benchmarks/attention.py

The candidates take their turns in one process. Ours is `models.attention.varlen_attention`; the others do the same work
with torch's own function and backends.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.machine import fastest_dtype
from benchmarks.memory import synchronize
from benchmarks.results import FOLDER, Results
from lightning_peft.models.attention import varlen_attention

HEADS, KEY_HEADS, HEAD_DIM = 9, 3, 64

SAMPLES = {
    "1 of 2048": [2048],
    "4 of 512": [512] * 4,
    "16 of 128": [128] * 16,
    "64 of 32": [32] * 64,
}
"""Lengths of the samples packed into one row."""

Attention = Callable[[Tensor, Tensor, Tensor, list[int]], Tensor]


def ours(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    bounds = torch.tensor([0, *lengths], device=query.device).cumsum(0).to(torch.int32)
    return varlen_attention(query, key, value, bounds, max(lengths), HEAD_DIM**-0.5)


def by_sample(backend: SDPBackend) -> Attention:
    def attend(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
        parts = zip(*(x.split(lengths, 2) for x in (query, key, value)), strict=True)
        with sdpa_kernel(backend):
            outputs = [F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) for q, k, v in parts]
        return torch.cat(outputs, 2).transpose(1, 2)

    return attend


def dense_mask(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    """Attend in one call whose (T, T) mask keeps the samples apart."""
    mask = torch.block_diag(*(torch.ones(n, n, device=query.device).tril() for n in lengths)).bool()
    return F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True).transpose(1, 2)


IMPLEMENTATIONS: dict[str, Attention] = {
    "ours": ours,
    "flash by sample": by_sample(SDPBackend.FLASH_ATTENTION),
    "math by sample": by_sample(SDPBackend.MATH),
    "one call, dense mask": dense_mask,
}


def inputs(tokens: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Draw query (1, 9, T, 64), key and value (1, 3, T, 64), laid out as projections make them."""
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int) -> Tensor:
        drawn = torch.randn(1, tokens, heads, HEAD_DIM, generator=generator)
        return drawn.to(device, dtype).transpose(1, 2).requires_grad_()

    return draw(HEADS), draw(KEY_HEADS), draw(KEY_HEADS)


def measure(lengths: list[int], repeats: int, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Measure the median seconds of a forward and backward pass of each implementation."""
    tensors = inputs(sum(lengths), dtype, device)
    seconds: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
    for _ in range(repeats + 1):
        for name, attend in IMPLEMENTATIONS.items():
            synchronize()
            started = time.perf_counter()
            torch.autograd.grad(attend(*tensors, lengths).sum(), tensors)
            synchronize()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, default=FOLDER / "attention.json")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, fastest_dtype(device))
    settings = {
        "heads": HEADS, "key_heads": KEY_HEADS, "head_dim": HEAD_DIM, "repeats": options.repeats,
        "dtype": str(dtype).removeprefix("torch."), "device": device,
    }  # fmt: skip
    results = Results(options.output, settings)
    for name, lengths in SAMPLES.items():
        row = measure(lengths, options.repeats, dtype, device)
        results.add(name, row)
        print(f"{name}: {', '.join(f'{other} {value * 1e3:.1f} ms' for other, value in row.items())}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
