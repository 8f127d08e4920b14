"""The spectrum of an adapter's change, layer by layer: its size, rank and directions."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_peft.adapters.base import Adapter
from lightning_peft.adapters.dora import DoRAEmbedding, DoRALinear
from lightning_peft.quantization.weights import dense_weight

DEAD = 1e-3
"""A direction is dead below this share of the layer's largest singular value, a number of ours."""
INTRUDER = 0.5
"""Cosine below which a direction of the tuned weight is none of the base's (Shuttleworth et al. 2024, section 3)."""


@dataclass(frozen=True)
class LayerSpectrum:
    """The change dW of one layer beside its base weight W; singular values are those of dW."""

    relative_norm: float | None
    """||dW|| / ||W||, Frobenius norms; None where W is all zero."""
    norm: float
    """||dW||."""
    rank: int
    """Directions that the change has by its form: the rank of its factors, or the smaller side of a dense change."""
    stable_rank: float
    """||dW||^2 over the largest singular value squared; 0 for no change."""
    effective_rank: float
    """exp of the entropy of the singular values' shares (Roy & Vetterli 2007); 0 for no change."""
    dead: int
    """Directions whose singular value is below `DEAD` times the largest."""
    balance: float | None
    """||B|| / ||A|| of a low-rank change, its scaling left out; None for another."""
    singular_values: list[float]
    """The singular values, the largest first, as many as `rank`."""
    intruders: int | None = None
    """Number among the largest left singular directions of W + dW that are none of W's; None where not looked for."""
    magnitude: float | None = None
    """Share of a DoRA's change that is its magnitude's: ||m - n||^2 beside ||s B A||^2, n the norms that m began as."""
    quantization_error: float | None = None
    """||W - what its codes stand for|| / ||W|| of a quantised base; None of a dense one, and where W is all zero."""


def layer_spectrum(layer: Adapter, intruders: int = 0) -> LayerSpectrum:
    """Measure one layer; look among so many of its largest directions for intruders, which takes two SVDs of W."""
    weight = dense_weight(layer.base_layer).detach().float()
    factors = layer.low_rank()
    if factors is None:
        change = layer.delta_weight().detach().float()
        values, rank, balance = torch.linalg.svdvals(change), min(change.shape), None
    else:
        values = low_rank_values(factors.A, factors.B) * abs(factors.scaling)
        rank = min(factors.A.shape[0], weight.shape[0], weight.shape[1])
        size = factors.A.norm()
        balance = float(factors.B.norm() / size) if size else None
        change = None
    values = values[:rank].double()
    squares = values.square().sum()
    largest = values[0] if len(values) else values.new_zeros(())
    shares = values / values.sum() if squares else values[:0]
    entropy = -(shares * shares.clamp_min(1e-30).log()).sum()
    found = None
    if intruders:
        whole = weight + (layer.delta_weight().detach().float() if change is None else change)
        found = count_intruders(weight, whole, intruders)
    return LayerSpectrum(
        relative_norm=relative(squares.sqrt(), weight.norm()),
        norm=float(squares.sqrt()),
        rank=rank,
        stable_rank=float(squares / largest.square()) if squares else 0.0,
        effective_rank=float(entropy.exp()) if squares else 0.0,
        dead=int((values <= DEAD * largest).sum()),
        balance=balance,
        singular_values=values.tolist(),
        intruders=found,
        magnitude=magnitude_share(layer) if isinstance(layer, DoRALinear | DoRAEmbedding) else None,
    )


def relative(norm: Tensor, weight_norm: Tensor) -> float | None:
    """Return one norm as a share of another; None where that is zero."""
    return float(norm.double() / weight_norm.double()) if weight_norm else None


def magnitude_share(layer: DoRALinear | DoRAEmbedding) -> float:
    """Return how much of a DoRA layer's change its magnitudes make, beside s B A; 0 for a layer that has not moved.

    The change is s B A + (m / n - 1) (W + s B A), and the rows of the second part have norm |m - n|.
    """
    A, B = (factor.detach().float() for factor in layer.factors())
    moved = float((layer.lora_magnitude_vector.detach() - layer.weight_norms()).double().square().sum())
    turned = float((low_rank_values(A, B).double() * layer.scaling).square().sum())
    return moved / (moved + turned) if moved + turned else 0.0


def low_rank_values(A: Tensor, B: Tensor) -> Tensor:
    """Return the singular values of B A, A (r, in) and B (out, r), from those of a matrix of r x r."""
    triangle_B, triangle_A = torch.linalg.qr(B.float()).R, torch.linalg.qr(A.float().mT).R
    return torch.linalg.svdvals(triangle_B @ triangle_A.mT)


def count_intruders(weight: Tensor, tuned: Tensor, count: int) -> int:
    """Count the largest left singular directions of `tuned` whose cosine with all of `weight`'s is below `INTRUDER`."""
    own = torch.linalg.svd(weight, full_matrices=False).U
    directions = torch.linalg.svd(tuned, full_matrices=False).U[:, :count]
    return int(((own.mT @ directions).abs().amax(0) < INTRUDER).sum())


def overlap(first: Adapter, second: Adapter) -> float | None:
    """Return the share of directions that two adapters of a layer have in common (Hu et al. 2021, eq. 4); 0 to 1.

    The share is ||U1^T U2||^2 / min(r1, r2) over the column spaces of the Bs; None where one is no low-rank sum.
    """
    factors = first.low_rank(), second.low_rank()
    if factors[0] is None or factors[1] is None:
        return None
    spaces = [column_space(part.A, part.B) for part in factors if part is not None]
    smaller = min(space.shape[1] for space in spaces)
    return float((spaces[0].mT @ spaces[1]).square().sum() / smaller) if smaller else 0.0


def column_space(A: Tensor, B: Tensor) -> Tensor:
    """Return an orthonormal basis (out, k) of the directions that B A writes, the dead ones left out."""
    basis_B, triangle_B = torch.linalg.qr(B.float())
    triangle_A = torch.linalg.qr(A.float().mT).R
    U, values, _ = torch.linalg.svd(triangle_B @ triangle_A.mT)
    alive = values > DEAD * values[:1]
    return basis_B @ U[:, : len(values)][:, alive]


def energy_shares(spectra: Mapping[str, LayerSpectrum], groups: Mapping[str, str]) -> dict[str, float]:
    """Return the share of the whole change's squared norm in each group of layers; `groups` is layer -> group."""
    total = sum(spectrum.norm**2 for spectrum in spectra.values())
    shares: dict[str, float] = {}
    for name, spectrum in spectra.items():
        share = spectrum.norm**2 / total if total else 0.0
        shares[groups[name]] = shares.get(groups[name], 0.0) + share
    return shares


def warnings_of(spectra: Mapping[str, LayerSpectrum]) -> list[str]:
    """Say what looks wrong: no change, one layer that holds it, ranks that are not used."""
    told = []
    still = [name for name, spectrum in spectra.items() if spectrum.norm == 0]
    if len(still) == len(spectra):
        return ["the adapter changes nothing: every layer is its base"]
    if still:
        told.append(f"{len(still)} of {len(spectra)} layers are unchanged, as {still[0]}")
    total = sum(spectrum.norm**2 for spectrum in spectra.values())
    name, most = max(spectra.items(), key=lambda item: item[1].norm)
    if len(spectra) > 1 and most.norm**2 > 0.5 * total:
        told.append(f"{name} holds {most.norm**2 / total:.0%} of the change")
    used = [spectrum for spectrum in spectra.values() if spectrum.norm]
    rank, effective = (mean(getattr(spectrum, key) for spectrum in used) for key in ("rank", "effective_rank"))
    if rank >= 8 and effective < rank / 4:
        told.append(f"rank {rank:.0f} is used as if it were {effective:.1f}: a smaller one may do")
    return told


def mean(values: Iterable[float]) -> float:
    """Return the mean; 0 of nothing."""
    found = list(values)
    return sum(found) / len(found) if found else 0.0
