"""LoRA: a low-rank change beside a frozen layer (Hu et al. 2021, arXiv:2106.09685)."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter, AdapterConfig, Target
from lightning_peft.adapters.bias import Bias
from lightning_peft.adapters.frozen_linear import (
    GIVEN,
    Base,
    FusedAdapter,
    base_gradients,
    base_input_gradient,
    base_with_product,
    can_redraw,
    factor_gradients,
    input_gradient,
    mark_written,
)
from lightning_peft.adapters.init import INITS, NEED_RANK_WITHIN_LAYER
from lightning_peft.quantization.weights import linear_shape

Init = Enum("Init", {name: name for name in INITS})  # type: ignore[misc]
"""Names of the initialisations; an Enum so that Hydra checks them."""


@dataclass
class LoRAConfig(AdapterConfig):
    method: str = "lora"
    dropout: float = 0.0
    """Probability of dropping an input of A."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732)."""
    init: Init = Init.kaiming  # type: ignore[attr-defined]
    """How A and B start."""
    bias: Bias = Bias.none
    """Biases of the base trained as well: none, all, or lora_only for those of the adapted layers."""
    eva_rho: float = 2.0
    """With init=eva, the most a layer's rank may grow when ranks go where they explain most; 1 keeps them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise ValueError(f"adapter.dropout={self.dropout}: must be in [0, 1)")
        if self.eva_rho < 1:
            raise ValueError(f"adapter.eva_rho={self.eva_rho}: must be at least 1")

    @property
    def rank_within_layer(self) -> bool:
        return self.init.name in NEED_RANK_WITHIN_LAYER

    def layer_options(self, target: Target) -> dict[str, Any]:
        return {
            "rank": target.rank,
            "alpha": target.alpha,
            "dropout": self.dropout,
            "rank_stabilized": self.rank_stabilized,
            "init": self.init.name,
        }


def random_state(device: torch.device) -> torch.Generator:
    """The generator that dropout on this device draws from."""
    return torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator


def dropout_mask(shape: torch.Size, dropout: float, like: Tensor, state: Tensor) -> Tensor:
    """What `F.dropout` multiplied by when the generator was in this state; the generator is left as it is."""
    generator = random_state(like.device)
    now = generator.get_state()
    generator.set_state(state)
    mask = F.dropout(like.new_ones(shape), dropout)
    generator.set_state(now)
    return mask


class LowRankProduct(torch.autograd.Function):
    """base + scaling * dropout(x) A^T B^T, where `base` is what the frozen layer makes of x.

    Saves the (N, R) product and, when A trains, x once in the dtype it came in: the same tensor for all layers that it
    is fed to. Dropout is drawn again in the backward pass. The gradients of A and B come out in their own dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, first: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float, dropout: float, *rest: Any
    ) -> Tensor:
        base = Base.of(first, rest)
        dtype = base.dtype
        ctx.dropout_state = random_state(x.device).get_state() if dropout else None
        cast = x.to(dtype)
        # Contiguous, as the mask that is drawn again is.
        dropped = F.dropout(x.contiguous(), dropout).to(dtype) if dropout else cast
        inner = dropped.reshape(-1, x.shape[-1]) @ (scaling * A).to(dtype).t()
        output = base_with_product(cast, base, inner, B.to(dtype))
        mark_written(ctx, base, output)
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, inner, A, B, *base.kept())
        ctx.base = base._replace(tensors=())
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.scaling, ctx.dropout = scaling, dropout
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, inner, A, B, *frozen = ctx.saved_tensors
        base = ctx.base._replace(tensors=tuple(frozen))
        dtype = grad.dtype
        grad_rows = grad.reshape(-1, grad.shape[-1])
        needs_x, needs_A, needs_B = ctx.needs_input_grad[1:4]
        grad_x = mask = None
        if ctx.dropout and (needs_x or needs_A):
            mask = dropout_mask(ctx.x_shape, ctx.dropout, grad.new_empty(0, dtype=ctx.x_dtype), ctx.dropout_state)
            mask = mask.view(-1, A.shape[1])
        dropped = None
        if needs_A:
            rows = x.reshape(-1, A.shape[1])
            dropped = (rows if mask is None else rows * mask).to(dtype)
            del rows
        # The small products first, while what they read is in the caches.
        grad_inner, grad_A, grad_B = factor_gradients(grad_rows, dropped, inner, B.to(dtype), needs_B)
        del x, dropped  # large, and the base's gradient is about to be made
        if grad_A is not None:
            grad_A = grad_A.to(A.dtype).mul_(ctx.scaling)
        if grad_B is not None:
            grad_B = grad_B.to(B.dtype)
        scaled_A = (ctx.scaling * A).to(dtype)
        if needs_x:
            if mask is None:
                grad_x = input_gradient(grad_rows, base, grad_inner, scaled_A)
            else:
                grad_x = mask.mul_(grad_inner @ scaled_A)
                if base.form != GIVEN:
                    grad_x = base_input_gradient(grad_rows, base).add_(grad_x)
            grad_x = grad_x.view(ctx.x_shape).to(ctx.x_dtype)
        grad_first, grad_rest = base_gradients(grad, base, ctx.needs_input_grad)
        return grad_first, grad_x, grad_A, grad_B, None, None, *grad_rest


def add_low_rank(base: Base, x: Tensor, A: Tensor, B: Tensor, scaling: float, dropout: float = 0.0) -> Tensor:
    """base + scaling * dropout(x) A^T B^T, (..., out_features). A base that was not run needs `can_redraw` to drop."""
    if dropout and not can_redraw(x):
        assert base.form == GIVEN
        x, dropout = F.dropout(x, dropout), 0.0
    return LowRankProduct.apply(base.first, x, A, B, scaling, dropout, *base.rest())


class LoRALinear(FusedAdapter):
    """y = W x + scaling * B A x, scaling = alpha / rank   (eq. 3 and section 4.1).

    A is (rank, in_features), B is (out_features, rank), both fp32 whatever the base computes in. With the default
    init A is Kaiming-uniform and B zero, so the layer starts as its base. Wraps nn.Linear, its 4-bit counterpart and
    GPT-2's Conv1D.
    """

    initial_A: Tensor | None
    initial_B: Tensor | None
    """A and B at the start, when the initialisation took them out of the base weight."""

    def __init__(
        self,
        base_layer: nn.Module,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        rank_stabilized: bool = False,
        init: str = "kaiming",
    ):
        super().__init__(base_layer)
        out_features, in_features = linear_shape(base_layer)
        device = next(base_layer.parameters()).device
        self.rank = rank
        self.scaling = alpha / rank**0.5 if rank_stabilized else alpha / rank
        self.dropout = dropout
        self.init = init
        self.lora_A = nn.Linear(in_features, rank, bias=False, device=device, dtype=torch.float32)
        self.lora_B = nn.Linear(rank, out_features, bias=False, device=device, dtype=torch.float32)
        self.register_buffer("initial_A", None, persistent=False)
        self.register_buffer("initial_B", None, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if not self.lora_A.weight.is_meta:
            INITS[self.init](self)

    @torch.no_grad()
    def set_factors(self, A: Tensor, B: Tensor) -> None:
        """Take these values of A (rank, in_features) and B (out_features, rank); another rank keeps the scaling."""
        if A.shape[0] != self.rank:
            self.rank = self.lora_A.out_features = self.lora_B.in_features = A.shape[0]
            self.lora_A.weight = nn.Parameter(torch.empty(A.shape, device=A.device))
            self.lora_B.weight = nn.Parameter(torch.empty(B.shape, device=B.device))
        self.lora_A.weight.copy_(A)
        self.lora_B.weight.copy_(B)

    def add_to(self, base: Base, x: Tensor) -> Tensor:
        return add_low_rank(base, x, *self.factors(), self.scaling, self.active_dropout)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (rank, in_features) and B (out_features, rank), as the product takes them."""
        return self.lora_A.weight, self.lora_B.weight

    def delta_weight(self) -> Tensor:
        return self.scaling * (self.lora_B.weight.float() @ self.lora_A.weight.float())


class LoRAEmbedding(Adapter):
    """y = W[id] + scaling * B A[:, id]   around an embedding (reference code of the paper).

    lora_embedding_A is (rank, num_embeddings), zero; lora_embedding_B is (dim, rank), standard normal.
    """

    def __init__(
        self,
        base_layer: nn.Embedding,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        rank_stabilized: bool = False,
        init: str = "kaiming",
    ):
        super().__init__(base_layer)
        if init not in ("kaiming", "gaussian"):
            raise ValueError(f"adapter.init={init} is not defined for embeddings: use kaiming or exclude the embedding")
        device = base_layer.weight.device
        self.rank = rank
        self.scaling = alpha / rank**0.5 if rank_stabilized else alpha / rank
        self.lora_embedding_A = nn.Parameter(
            torch.empty(rank, base_layer.num_embeddings, device=device, dtype=torch.float32)
        )
        self.lora_embedding_B = nn.Parameter(
            torch.empty(base_layer.embedding_dim, rank, device=device, dtype=torch.float32)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.lora_embedding_A)
        nn.init.normal_(self.lora_embedding_B)

    def adapt(self, x: Tensor, base_output: Tensor) -> Tensor:
        inner = F.embedding(x, self.lora_embedding_A.t()).to(base_output.dtype)
        return base_output + self.scaling * (inner @ self.lora_embedding_B.t().to(base_output.dtype))

    def delta_weight(self) -> Tensor:
        return self.scaling * (self.lora_embedding_B.float() @ self.lora_embedding_A.float()).t()
