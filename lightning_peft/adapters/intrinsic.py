"""Intrinsic dimension: every weight moves along one small trained vector (Aghajanyan et al. 2021, arXiv:2012.13255)."""

import math
import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_peft.adapters.base import Adapter, AdapterConfig, Target
from lightning_peft.adapters.method import Contract, Method, PeftSpelling, linears
from lightning_peft.quantization.weights import linear_shape

LARGEST_HADAMARD = 64
"""Side of the dense Hadamard matrices a transform is made of: at this size matrix products beat butterflies."""


@dataclass
class IntrinsicConfig(AdapterConfig):
    method: str = "intrinsic"
    rank: int | None = None
    dimension: int = 1000
    """Trained numbers in all: d of the paper."""
    structure_aware: bool = True
    """SAID: one of the d numbers per transformer block scales that block's change. False: DID, a plain projection."""
    projection_seed: int = 0
    """Seed of the random projection, which is never stored."""

    uses_rank: ClassVar[bool] = False
    uses_alpha: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dimension < 1:
            raise ValueError(f"adapter.dimension={self.dimension}: must be at least 1")


class IntrinsicVector(nn.Module):
    """The numbers that train: `intrinsic_vector`, from zero, and with SAID `block_scales`, one per block, from one.

    Together they have exactly `dimension` elements.
    """

    def __init__(self, config: IntrinsicConfig, targets: list[Target], model: nn.Module):
        super().__init__()
        depths = sorted({-1 if target.depth is None else target.depth for target in targets})
        self.row = {depth: row for row, depth in enumerate(depths)}
        scales = len(depths) if config.structure_aware else 0
        if config.dimension <= scales:
            raise ValueError(
                f"adapter.dimension={config.dimension}: must be above the {scales} blocks adapted, one scale each "
                "(or adapter.structure_aware=false)"
            )
        self.intrinsic_vector = nn.Parameter(torch.empty(config.dimension - scales))
        self.block_scales = nn.Parameter(torch.empty(scales)) if scales else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.intrinsic_vector)
        if self.block_scales is not None:
            nn.init.ones_(self.block_scales)

    def scaled(self, depth: int | None) -> Tensor:
        """Return the vector times the scale of a block, (dimension - blocks,)."""
        if self.block_scales is None:
            return self.intrinsic_vector
        return self.block_scales[self.row[-1 if depth is None else depth]] * self.intrinsic_vector


def hadamard_transform(x: Tensor) -> Tensor:
    """Return x H along the last dimension, a power of two; H has entries +-1, so H H = size * I."""
    size = x.shape[-1]
    if size <= LARGEST_HADAMARD:
        return x @ hadamard_matrix(size, x.device, x.dtype)
    outer = x.unflatten(-1, (-1, LARGEST_HADAMARD)) @ hadamard_matrix(LARGEST_HADAMARD, x.device, x.dtype)
    return hadamard_transform(outer.transpose(-1, -2)).transpose(-1, -2).flatten(-2)


def hadamard_matrix(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return Sylvester's (size, size) matrix."""
    matrix = torch.ones(1, 1, device=device, dtype=dtype)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


class Fastfood(nn.Module):
    """A fixed random linear map from d numbers to `size`, without a d x size matrix   (Le et al. 2013, section 3).

    The output comes in chunks of L = 2^ceil(log2 d): chunk c is H G_c Pi H S v with signs S, a permutation Pi and a
    Gaussian diagonal G_c of its own. It is scaled so that E |P v|^2 = |v|^2. Drawn on the CPU from the seed; holds
    size bf16 numbers and 2 L small ones.
    """

    signs: Tensor
    permutation: Tensor
    gaussian: Tensor

    def __init__(self, dimension: int, size: int, seed: int, device: torch.device):
        super().__init__()
        self.dimension, self.size, self.seed = dimension, size, seed
        length = 2 ** math.ceil(math.log2(dimension))
        chunks = -(-size // length)
        self.register_buffer("signs", torch.empty(length, device=device), persistent=False)
        self.register_buffer("permutation", torch.empty(length, dtype=torch.int64, device=device), persistent=False)
        self.register_buffer(
            "gaussian", torch.empty(chunks, length, dtype=torch.bfloat16, device=device), persistent=False
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.signs.is_meta:
            return
        generator = torch.Generator().manual_seed(self.seed)
        length = self.signs.shape[0]
        self.signs.copy_(torch.randint(0, 2, (length,), generator=generator) * 2 - 1)
        self.permutation.copy_(torch.randperm(length, generator=generator))
        for chunk in self.gaussian:
            chunk.copy_(torch.randn(length, generator=generator))

    def forward(self, v: Tensor) -> Tensor:
        """Map (dimension,) to (size,), in the dtype of v."""
        length = self.signs.shape[0]
        mixed = hadamard_transform(F.pad(v, (0, length - self.dimension)) * self.signs.to(v.dtype))[self.permutation]
        chunks = hadamard_transform(self.gaussian.to(v.dtype) * mixed)
        # Each output is a sum of L Gaussians times the L entries of `mixed`, whose energy is L |v|^2.
        return chunks.flatten()[: self.size] / math.sqrt(length * self.size)


class IntrinsicLinear(Adapter):
    """W = W0 + scale_i P_i(v)   (eqs. 2 and 3): v and the scales belong to the model, P_i is fixed and random.

    The dense change is formed in the forward pass and again in the backward pass, never kept.
    """

    def __init__(self, base_layer: nn.Module, target: Target, config: IntrinsicConfig, shared: IntrinsicVector):
        super().__init__(base_layer)
        self.shape = linear_shape(base_layer)
        self.depth = target.depth
        # The seed goes by the name, not the position: a layer has one projection whatever else is adapted.
        seed = config.projection_seed + zlib.crc32(target.name.encode())
        # The tuple keeps the vector from being a submodule of each layer: the model registers it once.
        self._shared = (shared,)
        self.projection = Fastfood(
            shared.intrinsic_vector.numel(), math.prod(self.shape), seed, next(base_layer.parameters()).device
        )

    def reset_parameters(self) -> None:
        self.projection.reset_parameters()

    def adapt(self, x: Tensor, base_output: Tensor) -> Tensor:
        v = self._shared[0].scaled(self.depth)
        return base_output + checkpoint(
            self._change, x.to(base_output.dtype), v, use_reentrant=False, preserve_rng_state=False
        )

    def _change(self, x: Tensor, v: Tensor) -> Tensor:
        return F.linear(x, self.projection(v).view(self.shape).to(x.dtype))

    def delta_weight(self) -> Tensor:
        return self.projection(self._shared[0].scaled(self.depth).float()).view(self.shape)


METHOD = Method(
    IntrinsicConfig,
    linears(IntrinsicLinear),
    trained=("adapter_shared.intrinsic_vector", "adapter_shared.block_scales"),
    change="a random projection of one short vector",
    paper="arXiv:2012.13255",
    count="d in all",
    shared=IntrinsicVector,
    peft=PeftSpelling(
        "INTRINSIC",
        (),
        {
            "dimension": "dimension",
            "structure_aware": "structure_aware",
            "projection_seed": "projection_seed",
        },
        rank_word=None,
        in_peft=False,
    ),
    contract=Contract(options={"dimension": 40}, shared=lambda config: config.dimension),
)
