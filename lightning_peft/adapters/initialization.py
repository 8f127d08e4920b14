"""The start of A and B of a low-rank adapter: pure functions, and `INITS`, the table of them.

A function returns the start of one layer from one matrix, which its row says: the layer's shape, its weight, what
quantisation took from its weight, or the directions of its activations.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_peft.quantization.weights import dense_weight, is_quantized


class Start(NamedTuple):
    """First values of A (rank, in_features) and B (out_features, rank), fp32."""

    A: Tensor
    B: Tensor | None = None
    """None stands for zero."""
    from_base: bool = False
    """Take scaling * B A out of the base weight, so that the layer starts as its base."""


class Reads(Enum):
    """The matrix that an initialisation starts from."""

    shape = "shape"
    """(out_features, in_features) without values: only its shape and device count."""
    weight = "weight"
    """The base weight (out_features, in_features), fp32; on a quantised base the weight before quantisation."""
    quantisation_error = "quantisation_error"
    """The weight before quantisation minus the one after, (out_features, in_features), fp32."""
    activations = "activations"
    """Orthonormal directions of the layer's inputs, the leading ones first, (directions, in_features), fp32."""


@dataclass(frozen=True)
class Initialization:
    """A row of `INITS`."""

    start: Callable[[Tensor, int, float], Start]
    """(matrix, rank, scaling) -> the start of one layer."""
    reads: Reads = Reads.shape
    """The matrix that `start` reads; where it is not the layer's own, the layer starts as kaiming until it is there."""
    bounds_rank: bool = False
    """True where a layer has no more directions than its smaller side, so that a higher rank is an error."""
    rewrites_base: bool = False
    """True where `start` takes its product out of the base weight."""
    in_peft: bool = False
    """True where HF PEFT, with `init_lora_weights` of this name, leaves exactly the same base."""
    is_neutral: bool = False
    """True where the layer starts as its base with nothing taken out, so that loaded values may replace the start."""

    @property
    def spreads_ranks(self) -> bool:
        """Return whether ranks go to the layers by what is measured there, and so differ in the file."""
        return self.reads is Reads.activations


def kaiming(matrix: Tensor, rank: int, scaling: float) -> Start:
    """Draw A ~ U(-1/sqrt(in), 1/sqrt(in)) and set B = 0, as the reference code of the LoRA paper does."""
    A = torch.empty(rank, matrix.shape[1], device=matrix.device)
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    return Start(A)


def gaussian(matrix: Tensor, rank: int, scaling: float) -> Start:
    """Draw A ~ N(0, 1/rank^2) and set B = 0."""
    A = torch.empty(rank, matrix.shape[1], device=matrix.device)
    nn.init.normal_(A, std=1 / rank)
    return Start(A)


def orthogonal(matrix: Tensor, rank: int, scaling: float) -> Start:
    """Draw A and B in orthogonal spaces, both non-zero, so that B A = 0. The rank must be even."""
    if rank % 2:
        raise ValueError(f"adapter.rank={rank}: adapter.init=orthogonal splits the rank in two, take an even one")
    out_features, in_features = matrix.shape
    Q = torch.linalg.qr(torch.randn(rank, rank, device=matrix.device)).Q
    A = torch.randn(in_features, rank // 2, device=matrix.device) @ Q[0::2] / 10
    B = torch.randn(out_features, rank // 2, device=matrix.device) @ Q[1::2] / 10
    return Start(A.t(), B)


def pissa(weight: Tensor, rank: int, scaling: float) -> Start:
    """Set A and B to the largest singular parts of W, which leave W (Meng et al. 2024, arXiv:2404.02948)."""
    return Start(*principal_factors(weight, rank, scaling), from_base=True)


def pissa_fast(weight: Tensor, rank: int, scaling: float) -> Start:
    """Do PiSSA with a randomised SVD: seconds for a layer that takes minutes, and the same function at the start."""
    return Start(*principal_factors(weight, rank, scaling, fast=True), from_base=True)


def olora(weight: Tensor, rank: int, scaling: float) -> Start:
    """Set B and A to the leading part of W's QR decomposition, which leaves W (Buyukakyuz 2024, arXiv:2406.01775)."""
    Q, R = torch.linalg.qr(weight)
    return Start(R[:rank], Q[:, :rank], from_base=True)


def loftq(error: Tensor, rank: int, scaling: float) -> Start:
    """Set scaling * B A to the best product for what quantisation lost (Li et al. 2023, arXiv:2310.08659).

    There is one alternation, so that the codes stay.
    """
    return Start(*principal_factors(error, rank, scaling))


def eva(directions: Tensor, rank: int, scaling: float) -> Start:
    """Set A to the leading directions of the layer's inputs and B = 0 (Paischer et al. 2024, arXiv:2410.07170)."""
    return Start(directions[:rank])


INITS: dict[str, Initialization] = {
    "kaiming": Initialization(kaiming, is_neutral=True),
    "gaussian": Initialization(gaussian, is_neutral=True),
    "orthogonal": Initialization(orthogonal),
    "pissa": Initialization(pissa, Reads.weight, bounds_rank=True, rewrites_base=True, in_peft=True),
    "pissa_fast": Initialization(pissa_fast, Reads.weight, bounds_rank=True, rewrites_base=True),
    "olora": Initialization(olora, Reads.weight, bounds_rank=True, rewrites_base=True, in_peft=True),
    "eva": Initialization(eva, Reads.activations, bounds_rank=True),
    "loftq": Initialization(loftq, Reads.quantisation_error, bounds_rank=True),
}


def principal_factors(matrix: Tensor, rank: int, scaling: float, fast: bool = False) -> tuple[Tensor, Tensor]:
    """Return A and B with scaling * B A the closest product of that rank to the matrix (out, in); fp32."""
    if fast:
        with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
            torch.manual_seed(0)
            U, S, V = torch.svd_lowrank(matrix, q=min(rank + 8, *matrix.shape), niter=8)
        Vh = V.t()
    else:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    root = (S[:rank] / scaling).sqrt()
    return root[:, None] * Vh[:rank], U[:, :rank] * root


@torch.no_grad()
def initialize_from_weights(layers: Mapping[str, Any], read_weight: Callable[[str], Tensor]) -> int:
    """Start the layers on a quantised base from the weights before quantisation; return how many were started.

    `read_weight(name)` gives a layer's original weight (out, in). ValueError for an initialisation that makes up for
    quantisation on a base that is not quantised.
    """
    done = 0
    for name, layer in layers.items():
        reads = layer.initialization.reads
        if reads is Reads.quantisation_error and not is_quantized(layer.base_layer):
            raise ValueError(f"adapter.init={layer.init} makes up for quantisation: use quantization=nf4 with it")
        if not is_quantized(layer.base_layer) or reads not in (Reads.weight, Reads.quantisation_error):
            continue
        dense = dense_weight(layer.base_layer).float()
        weight = read_weight(name).to(dense.device, torch.float32)
        layer.start_from(weight - dense if reads is Reads.quantisation_error else weight)
        done += 1
    return done
