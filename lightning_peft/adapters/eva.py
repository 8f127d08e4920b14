"""EVA: A from the activations a layer sees, ranks where they explain most (Paischer et al. 2024, arXiv:2410.07170)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter


@dataclass
class Sketch:
    """Leading right singular vectors of all rows seen, updated batch by batch in memory of (rank, width)."""

    rank: int
    rows: Tensor | None = None
    """S V^T, (rank, width), fp32."""
    total: float = 0.0
    """Sum of squares of everything seen."""
    layers: list[str] = field(default_factory=list)
    """Layers fed by these activations."""

    def update(self, x: Tensor) -> None:
        x = x.float()
        self.total += float(x.square().sum())
        stacked = x if self.rows is None else torch.cat([self.rows, x])
        q = min(self.rank + 8, *stacked.shape)
        _, S, V = torch.svd_lowrank(stacked, q=q, niter=2)
        self.rows = (S[:, None] * V.t())[: self.rank]

    def directions(self) -> tuple[Tensor, list[float]]:
        """Return orthonormal rows, and the share of the activations' energy along each."""
        assert self.rows is not None
        lengths = self.rows.norm(dim=1)
        return self.rows / lengths[:, None].clamp_min(1e-30), (lengths.square() / self.total).tolist()


@torch.no_grad()
def initialize_from_activations(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], rho: float = 2.0
) -> dict[str, int]:
    """Start every layer whose initialisation reads activations from a few batches; return the rank of each.

    The batches are keyword arguments of the model; where `attention_mask` (B, T) is 0 tokens are left out. A becomes
    the leading right singular vectors of the layer's inputs (not centred), B stays zero. All layers together keep their
    sum of ranks, which goes to the directions that explain most of their layer's activations: at least 1 and at most
    rho x rank a layer, with unchanged scaling. rho=1 keeps the ranks.
    """
    layers: dict[str, Any] = {n: m for n, m in model.named_modules() if _reads_activations(m)}
    sketches = _observe(model, layers, batches, rho)
    directions = {name: sketch.directions() for sketch in sketches for name in sketch.layers}
    missing = [name for name in layers if name not in directions]
    if missing:
        raise ValueError(f"adapter.init={layers[missing[0]].init}: {missing[0]} saw no tokens in the batches given")
    ranks = _share_ranks({n: layer.rank for n, layer in layers.items()}, {n: d[1] for n, d in directions.items()}, rho)
    for name, layer in layers.items():
        layer.start_from(directions[name][0], ranks[name])
    return ranks


def _reads_activations(module: nn.Module) -> bool:
    return isinstance(module, Adapter) and module.initialization.spreads_ranks


def _observe(
    model: nn.Module, layers: Mapping[str, Any], batches: Iterable[Mapping[str, Any]], rho: float
) -> list[Sketch]:
    """Return one sketch for each distinct input among the layers: q, k and v, for example, are fed the same tensor."""
    sketches: dict[str, Sketch] = {}
    feeder: dict[str, str] = {}
    last: list[Any] = [None, ""]
    mask: Tensor | None = None

    def record(name: str, x: Tensor) -> None:
        if x is not last[0]:
            last[:] = [x, name]
        feeder.setdefault(name, last[1])
        if feeder[name] != name:
            return
        rank = max(1, round(rho * layers[name].rank))
        sketch = sketches.setdefault(name, Sketch(min(rank, x.shape[-1])))
        sketch.update(x.reshape(-1, x.shape[-1]) if mask is None else x[mask])

    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: record(name, inputs[0]))
        for name, layer in layers.items()
    ]
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for batch in batches:
                found = batch.get("attention_mask")
                mask = found.bool() if found is not None and found.ndim == 2 else None
                model(**batch)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    for name, leader in feeder.items():
        sketches[leader].layers.append(name)
    return list(sketches.values())


def _share_ranks(ranks: Mapping[str, int], shares: Mapping[str, list[float]], rho: float) -> dict[str, int]:
    """Return ranks with the same sum, for the directions with the largest shares."""
    if rho == 1:
        return dict(ranks)
    given = dict.fromkeys(ranks, 1)
    offers = sorted(
        ((share, name) for name, found in shares.items() for share in found[1 : max(1, round(rho * ranks[name]))]),
        key=lambda offer: (-offer[0], offer[1]),
    )
    for _, name in offers[: sum(ranks.values()) - len(ranks)]:
        given[name] += 1
    return given
