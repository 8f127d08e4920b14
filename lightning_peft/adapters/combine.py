"""Low-rank changes cut to a rank, and several changes of one weight made one: sums, TIES and DARE."""

from collections.abc import Callable, Sequence
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_peft.adapters.base import LowRank


class Cut(NamedTuple):
    """A rank to cut a change to: a number, or one that keeps a share of the energy; neither keeps what there is."""

    rank: int | None = None
    energy: float | None = None
    """Share of the squared singular values that is kept, above 0 and at most 1."""


class Combine(Enum):
    """The ways several changes of a weight become one."""

    linear = "linear"
    """Their weighted sum, exact: the ranks add up."""
    svd = "svd"
    """Their weighted sum cut to the largest of their ranks."""
    ties = "ties"
    """The largest numbers of each alone, of one sign (Yadav et al. 2023, arXiv:2306.01708)."""
    dare = "dare"
    """The weighted sum of what is left after numbers are dropped at random, and the rest enlarged (Yu et al. 2023,
    arXiv:2311.03099)."""


def cut(change: LowRank, to: Cut) -> tuple[LowRank, float]:
    """Return the best approximation of a rank, with scaling one, and the share of the energy that is lost.

    The work is on the factors: the product is never formed.
    """
    Q_B, R_B = torch.linalg.qr(change.scaling * change.B)
    Q_A, R_A = torch.linalg.qr(change.A.t())
    U, S, V = torch.linalg.svd(R_B @ R_A.t(), full_matrices=False)
    return _leading(Q_B @ U, S, V @ Q_A.t(), to)


def cut_dense(change: Tensor, to: Cut) -> tuple[LowRank, float]:
    """Cut a dense change (out_features, in_features) as `cut` does a low-rank one."""
    U, S, V = torch.linalg.svd(change, full_matrices=False)
    return _leading(U, S, V, to)


def rank_of_energy(singular_values: Tensor, share: float) -> int:
    """Return the smallest rank, from 1, that keeps this share of the squared singular values, largest first."""
    energy = singular_values.double().square()
    lost = energy.sum() - energy.cumsum(0)
    return int((lost > (1 - share) * energy.sum() * (1 + 1e-12)).sum().clamp_max(len(energy) - 1)) + 1


def _leading(U: Tensor, S: Tensor, V: Tensor, to: Cut) -> tuple[LowRank, float]:
    rank = len(S) if to.rank is None else min(to.rank, len(S))
    if to.energy is not None:
        rank = min(rank, rank_of_energy(S, to.energy))
    energy = S.double().square()
    lost = float(energy[rank:].sum() / energy.sum().clamp_min(torch.finfo(torch.float64).tiny))
    root = S[:rank].sqrt()
    return LowRank((root[:, None] * V[:rank]).contiguous(), (U[:, :rank] * root).contiguous(), 1.0), lost


def dense(change: LowRank) -> Tensor:
    """Return the change as a matrix (out_features, in_features), fp32."""
    return change.scaling * (change.B @ change.A)


def concatenated(changes: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Return the weighted sum of changes, exact, as one of the summed rank with scaling one."""
    scales = [weight * change.scaling for weight, change in zip(weights, changes, strict=True)]
    # Both factors take the root, so that neither is out of proportion to the other.
    A = torch.cat([abs(scale) ** 0.5 * change.A for scale, change in zip(scales, changes, strict=True)])
    signed = [(1 if scale >= 0 else -1) * abs(scale) ** 0.5 for scale in scales]
    B = torch.cat([scale * change.B for scale, change in zip(signed, changes, strict=True)], dim=1)
    return LowRank(A, B, 1.0)


def ties(changes: Sequence[Tensor], density: float, generator: torch.Generator) -> Tensor:
    """Return the changes (out, in) trimmed, their sign elected, and the mean of those that have it (section 4.2).

    Each change is trimmed to the largest `density` of its numbers, in this weight alone; lambda is one.
    """
    trimmed = torch.stack([_largest(change, density) for change in changes])
    signs = trimmed.sum(0).sign()
    agreeing = (trimmed.sign() == signs) & (trimmed != 0)
    return (trimmed * agreeing).sum(0) / agreeing.sum(0).clamp_min(1)


def dare(changes: Sequence[Tensor], density: float, generator: torch.Generator) -> Tensor:
    """Return the sum of changes of which each number is kept with probability `density` and divided by it."""
    kept = [torch.rand(change.shape, generator=generator).to(change.device) < density for change in changes]
    return torch.stack([change * keep / density for change, keep in zip(changes, kept, strict=True)]).sum(0)


def _largest(change: Tensor, density: float) -> Tensor:
    """Return the change with all but the largest `density` of its numbers at zero."""
    count = int(density * change.numel())
    kept = change.abs().flatten().topk(count).indices
    flat = torch.zeros_like(change).flatten()
    flat[kept] = change.flatten()[kept]
    return flat.view_as(change)


DENSE: dict[Combine, Callable[[Sequence[Tensor], float, torch.Generator], Tensor]] = {
    Combine.ties: ties,
    Combine.dare: dare,
}
"""Combinations that work on the changes as matrices, each times its weight, and leave no low-rank sum."""
DENSITY = {Combine.ties: 0.2, Combine.dare: 0.5}
"""Share of numbers that is kept where none is given: 0.2 is the paper's, 0.5 is ours."""


def combined(
    changes: Sequence[LowRank], weights: Sequence[float], how: Combine, density: float, generator: torch.Generator
) -> LowRank | Tensor:
    """Return several changes of one weight as one: a low-rank sum, or a matrix (out, in) where it is none.

    ties and dare take each change times its weight; `generator`, on the CPU, draws what dare drops.
    """
    if how not in DENSE:
        return concatenated(changes, weights)
    scaled = [weight * dense(change) for weight, change in zip(weights, changes, strict=True)]
    return DENSE[how](scaled, density, generator)
