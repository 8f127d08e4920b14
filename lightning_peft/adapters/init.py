"""How A and B of a low-rank adapter start. A row of `INITS` fills both, in place, from the layer it is given."""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_peft.quantization.weights import dense_weight, is_quantized, write_weight

if TYPE_CHECKING:
    from lightning_peft.adapters.lora import LoRALinear


def init_kaiming(layer: "LoRALinear") -> None:
    """A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0: the reference code of the LoRA paper."""
    nn.init.kaiming_uniform_(layer.lora_A.weight, a=math.sqrt(5))
    nn.init.zeros_(layer.lora_B.weight)


def init_gaussian(layer: "LoRALinear") -> None:
    """A ~ N(0, 1/rank^2), B = 0."""
    nn.init.normal_(layer.lora_A.weight, std=1 / layer.rank)
    nn.init.zeros_(layer.lora_B.weight)


def init_orthogonal(layer: "LoRALinear") -> None:
    """A and B both non-zero in spaces that are orthogonal, so that B A = 0. The rank must be even."""
    if layer.rank % 2:
        raise ValueError(f"adapter.rank={layer.rank}: adapter.init=orthogonal splits the rank in two, take an even one")
    half, (out_features, in_features) = layer.rank // 2, (layer.lora_B.out_features, layer.lora_A.in_features)
    device = layer.lora_A.weight.device
    Q = torch.linalg.qr(torch.randn(layer.rank, layer.rank, device=device)).Q
    A = torch.randn(in_features, half, device=device) @ Q[0::2] / 10
    B = torch.randn(out_features, half, device=device) @ Q[1::2] / 10
    layer.set_factors(A.t(), B)


def init_pissa(layer: "LoRALinear") -> None:
    """A and B are the largest singular parts of W, which leaves W (Meng et al. 2024, arXiv:2404.02948)."""
    weight = untouched_weight(layer)
    rewrite_base(layer, weight, *principal_factors(weight, layer.rank, layer.scaling))


def init_pissa_fast(layer: "LoRALinear") -> None:
    """PiSSA with a randomised SVD: seconds for a layer that takes minutes, and the same function at the start."""
    weight = untouched_weight(layer)
    rewrite_base(layer, weight, *principal_factors(weight, layer.rank, layer.scaling, fast=True))


def init_olora(layer: "LoRALinear") -> None:
    """B and A are the leading part of the QR decomposition of W, which leaves W (Buyukakyuz 2024, arXiv:2406.01775)."""
    weight = untouched_weight(layer)
    Q, R = torch.linalg.qr(weight)
    rewrite_base(layer, weight, R[: layer.rank], Q[:, : layer.rank])


INITS: dict[str, Callable[["LoRALinear"], None]] = {
    "kaiming": init_kaiming,
    "gaussian": init_gaussian,
    "orthogonal": init_orthogonal,
    "pissa": init_pissa,
    "pissa_fast": init_pissa_fast,
    "olora": init_olora,
    "eva": init_kaiming,
    "loftq": init_kaiming,
}
"""eva and loftq need more than the layer: they start as kaiming until `initialize_from_activations` or
`initialize_from_weights` is called on the model."""

NEED_ACTIVATIONS = frozenset({"eva"})
NEED_WEIGHTS = frozenset({"loftq", "pissa", "pissa_fast", "olora"})
"""On a quantised base these start from the weights before quantisation."""
NEED_RANK_WITHIN_LAYER = frozenset({"pissa", "pissa_fast", "olora", "eva", "loftq"})


def principal_factors(matrix: Tensor, rank: int, scaling: float, fast: bool = False) -> tuple[Tensor, Tensor]:
    """A and B with scaling * B A the closest product of that rank to the matrix (out, in); fp32."""
    if fast:
        with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
            torch.manual_seed(0)
            U, S, V = torch.svd_lowrank(matrix, q=min(rank + 8, *matrix.shape), niter=8)
        Vh = V.t()
    else:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    root = (S[:rank] / scaling).sqrt()
    return root[:, None] * Vh[:rank], U[:, :rank] * root


def untouched_weight(layer: "LoRALinear") -> Tensor:
    """The base weight before an initialisation rewrote it, fp32."""
    weight = dense_weight(layer.base_layer).float()
    if layer.initial_A is not None and layer.initial_B is not None:
        weight = weight + layer.scaling * (layer.initial_B @ layer.initial_A)
    return weight


@torch.no_grad()
def rewrite_base(layer: "LoRALinear", weight: Tensor, A: Tensor, B: Tensor) -> None:
    """Start at A and B, take scaling * B A out of the base, and remember both for `plain_factors`.

    A quantised base stores the nearest codes to what is left.
    """
    layer.initial_A, layer.initial_B = A.clone(), B.clone()
    write_weight(layer.base_layer, weight - layer.scaling * (B @ A), requantize=True)
    layer.set_factors(A, B)


def plain_factors(layer: "LoRALinear", A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """What A and B of the layer, whole as they are now, are as a LoRA with its scaling on the untouched base.

    Themselves when the base was never rewritten; else [A; A_0] and [B, -B_0], of twice the rank.
    """
    if layer.initial_A is None or layer.initial_B is None:
        return A, B
    return torch.cat([A, layer.initial_A.to(A.device)]), torch.cat([B, -layer.initial_B.to(B.device)], dim=1)


@torch.no_grad()
def initialize_from_weights(layers: Mapping[str, Any], read_weight: Callable[[str], Tensor]) -> int:
    """Start the layers on a quantised base from the weights before quantisation; returns how many.

    `read_weight(name)` gives a layer's original weight (out, in). loftq: scaling * B A is the best product for what
    quantisation lost (Li et al. 2023, arXiv:2310.08659, one alternation, so the codes stay). pissa and olora: decompose
    the original and quantise the rest. ValueError for loftq on a base that is not quantised.
    """
    done = 0
    for name, layer in layers.items():
        init = getattr(layer, "init", None)
        if init == "loftq" and not is_quantized(layer.base_layer):
            raise ValueError("adapter.init=loftq makes up for quantisation: use quantization=nf4 with it")
        if not is_quantized(layer.base_layer) or init not in ("loftq", "pissa", "pissa_fast", "olora"):
            continue
        weight = read_weight(name).to(layer.lora_A.weight.device, torch.float32)
        if init == "loftq":
            lost = weight - dense_weight(layer.base_layer).float()
            layer.set_factors(*principal_factors(lost, layer.rank, layer.scaling))
        elif init == "olora":
            Q, R = torch.linalg.qr(weight)
            rewrite_base(layer, weight, R[: layer.rank], Q[:, : layer.rank])
        else:
            factors = principal_factors(weight, layer.rank, layer.scaling, fast=init == "pissa_fast")
            rewrite_base(layer, weight, *factors)
        done += 1
    return done
