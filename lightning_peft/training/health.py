"""An adapter's changes of its layers while it trains: the size and rank of every change, and what looks wrong."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lightning_peft.adapters.base import Adapter
from lightning_peft.adapters.inject import adapters
from lightning_peft.quantization.experts import ExpertLinear, QuantizedExperts
from lightning_peft.quantization.weights import dense_weight

NOTHING = 1e-9
"""||dW|| / ||W|| up to which a layer counts as unchanged: fp32 rounds at 1e-7, and a weight at least moves its last
digit before outputs do. Ours."""
HOLDS_THE_CHANGE = 0.5
"""Share of the squared norm of all changes from which on one layer is said to hold the change."""
LEAST_RANK, UNUSED = 8, 0.25
"""From this rank on, ranks count as unused where the effective rank is below this share of them, as 6 of 64 is."""
POWER_STEPS = 20


@dataclass(frozen=True)
class ChangeSize:
    """The change dW of one layer beside its base weight W, as it is now."""

    relative_norm: float
    """||dW|| / ||W||, Frobenius norms; inf where W is all zero and dW is not, nan as the others where dW is not
    finite."""
    norm: float
    stable_rank: float
    """||dW||^2 over the largest singular value squared; 0 for no change."""
    rank: int | None
    """Directions that the factors have; None for a change that is no low-rank sum."""
    effective_rank: float | None
    """exp of the entropy of the singular values' shares (Roy & Vetterli 2007); None likewise."""


class ChangeMeter:
    """Measures the layers of a model again and again; the norms of the frozen weights are taken once."""

    def __init__(self) -> None:
        self.weight_norms: dict[str, Tensor] = {}

    @torch.no_grad()
    def measure(self, model: nn.Module, root: nn.Module) -> dict[str, ChangeSize]:
        """Return each adapted layer's change by its name. Stacks of experts are left out: their matrices are not one.

        `root` is the model, or what is sharded around it. The host reads the small matrices once. All ranks call it
        together: sharded blocks are gathered one by one.
        """
        grams: dict[str, tuple[Tensor, Tensor, float]] = {}
        others: dict[str, tuple[Tensor, Tensor]] = {}
        for owner, layers in by_owner(model, root):
            with gathered_block(owner):
                for name, layer in layers:
                    if name not in self.weight_norms:
                        self.weight_norms[name] = dense_weight(layer.base_layer).float().norm()
                    factors = layer.low_rank()
                    if factors is None:
                        others[name] = norm_and_largest(layer.delta_weight().float())
                    else:
                        A, B = factors.A.double(), factors.B.double()
                        grams[name] = (A @ A.mT, B.mT @ B, factors.scaling)
        found = {name: self._of_values(name, *sizes) for name, sizes in others.items()}
        for name, values in singular_values(grams).items():
            squares = float(values.square().sum())
            largest = float(values.max()) if len(values) else 0.0
            norm = math.sqrt(squares)
            shares = values[values > 0] / values.sum()
            effective = float(torch.exp(-(shares * shares.log()).sum())) if squares else 0.0
            effective = effective if math.isfinite(norm) else math.nan
            stable = squares / largest**2 if squares else 0.0
            found[name] = ChangeSize(self._relative(name, norm), norm, stable, len(values), effective)
        return {name: found[name] for name, _ in measured_layers(model)}

    def _of_values(self, name: str, norm: Tensor, largest: Tensor) -> ChangeSize:
        size, first = float(norm), float(largest)
        stable = (size / first) ** 2 if first else 0.0
        return ChangeSize(self._relative(name, size), size, stable, None, None)

    def _relative(self, name: str, norm: float) -> float:
        """Return a change's norm beside that of its base weight, which may be all zero."""
        weight = float(self.weight_norms[name])
        return norm / weight if weight else math.inf * norm if norm else 0.0


def measured_layers(model: nn.Module) -> list[tuple[str, Adapter]]:
    """Return the adapters around one matrix each, by name."""
    return [
        (n, layer) for n, layer in adapters(model) if not isinstance(layer.base_layer, ExpertLinear | QuantizedExperts)
    ]


def by_owner(model: nn.Module, root: nn.Module) -> list[tuple[FSDPModule | None, list[tuple[str, Adapter]]]]:
    """Return the measured layers in groups, each with the module that gathers its shards; None where nothing does.

    `root` holds the model, and what is sharded with none of its blocks.
    """
    owner_of: dict[nn.Module, FSDPModule | None] = {}

    def walk(module: nn.Module, owner: FSDPModule | None) -> None:
        owner = module if isinstance(module, FSDPModule) else owner
        owner_of[module] = owner
        for child in module.children():
            walk(child, owner)

    walk(root, None)
    groups: dict[FSDPModule | None, list[tuple[str, Adapter]]] = {}
    for name, layer in measured_layers(model):
        groups.setdefault(owner_of[layer], []).append((name, layer))
    return list(groups.items())


@contextmanager
def gathered_block(owner: FSDPModule | None) -> Iterator[None]:
    """Keep the parameters of a sharded module whole, inside the block."""
    if owner is None:
        yield
        return
    owner.unshard()
    try:
        yield
    finally:
        owner.reshard()


def singular_values(grams: dict[str, tuple[Tensor, Tensor, float]]) -> dict[str, Tensor]:
    """Return the singular values of scaling B A by layer, fp64 on the host, from A A^T, B^T B and scaling.

    The squared singular values of B A are the eigenvalues of sqrt(B^T B) A A^T sqrt(B^T B), matrices of rank x rank.
    Where a number is not finite, the values are nan.
    """
    by_rank: dict[int, list[str]] = {}
    for name, (gram, _, _) in grams.items():
        by_rank.setdefault(gram.shape[0], []).append(name)
    found: dict[str, Tensor] = {}
    for names in by_rank.values():
        gram_A = torch.stack([grams[name][0] for name in names]).cpu()
        gram_B = torch.stack([grams[name][1] for name in names]).cpu()
        is_finite = (gram_A.isfinite() & gram_B.isfinite()).all(2).all(1)
        gram_A, gram_B = (torch.where(is_finite[:, None, None], gram, 0.0) for gram in (gram_A, gram_B))
        squares, U = torch.linalg.eigh(gram_B)  # raises for nan
        roots = squares.clamp_min(0).sqrt()[:, :, None]
        inner = roots * (U.mT @ gram_A @ U) * roots.mT
        values = torch.linalg.eigvalsh(inner).clamp_min(0).sqrt()
        values = torch.where(is_finite[:, None], values, math.nan)
        found |= {name: row * abs(grams[name][2]) for name, row in zip(names, values, strict=True)}
    return found


def norm_and_largest(change: Tensor) -> tuple[Tensor, Tensor]:
    """Return Frobenius norm and largest singular value of a matrix, the second by power iteration."""
    x = torch.ones(change.shape[1], dtype=change.dtype, device=change.device)
    x += torch.arange(len(x), dtype=change.dtype, device=change.device) / len(x)  # no direction of a symmetric matrix
    for _ in range(POWER_STEPS):
        x = nn.functional.normalize(change.mT @ (change @ x), dim=0)
    return change.norm(), (change @ x).norm()


def is_no_op(changes: Iterable[ChangeSize]) -> bool:
    """Return whether no layer differs from its base; False where nothing was measured, or where one is not finite."""
    sizes = [change.relative_norm for change in changes]
    return bool(sizes) and all(size <= NOTHING for size in sizes)


def alarms_of(changes: Mapping[str, ChangeSize]) -> dict[str, str]:
    """Say what looks wrong, by kind: no change, one layer that holds it, ranks that are not used.

    Layers that are not finite are left out: of them the guard speaks.
    """
    if is_no_op(changes.values()):
        return {"no change": "the adapter changes nothing: every layer is its base"}
    changes = {name: change for name, change in changes.items() if math.isfinite(change.norm)}
    told = {}
    total = sum(change.norm**2 for change in changes.values())
    name, most = max(changes.items(), key=lambda item: item[1].norm, default=("", None))
    if most is not None and len(changes) > 1 and most.norm**2 > HOLDS_THE_CHANGE * total:
        told["one layer"] = f"{name} holds {most.norm**2 / total:.0%} of the adapter's change"
    ranks = [(c.rank, c.effective_rank) for c in changes.values() if c.rank and c.effective_rank]
    if ranks:
        rank = sum(rank for rank, _ in ranks) / len(ranks)
        effective = sum(value for _, value in ranks) / len(ranks)
        if rank >= LEAST_RANK and effective < UNUSED * rank:
            told["unused rank"] = f"rank {rank:.0f} is used as if it were {effective:.1f}: a smaller one may do"
    return told
