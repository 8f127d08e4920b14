"""DoRA: direction from LoRA, magnitude trained apart (Liu et al. 2024, arXiv:2402.09353)."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.adapters.lora import LoRAConfig, LoRAEmbedding, LoRALinear
from lightning_peft.kernels.frozen_linear import GIVEN, Base
from lightning_peft.kernels.low_rank import add_and_scale
from lightning_peft.quantization.weights import dense_weight

ROWS_AT_ONCE = 2**24
"""Elements of the base weight held in fp32 at a time while norms are taken."""


@dataclass
class DoRAConfig(LoRAConfig):
    method: str = "dora"


def squared_row_norms(weight: Tensor) -> Tensor:
    """(out, in) -> (out,), fp32."""
    rows = max(1, ROWS_AT_ONCE // weight.shape[1])
    return torch.cat([part.float().square().sum(1) for part in weight.split(rows)])


def adapted_row_norms(weight: Tensor, squared_norms: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Row norms of W + s B A, fp32, (out,), without forming B A.

    n^2 = ||W||^2 + 2 s <B, W A^T> + s^2 <B A A^T, B>, inner products by row; `squared_norms` is the first term.
    """
    A, B = A.float(), B.float()
    rows = max(1, ROWS_AT_ONCE // weight.shape[1])
    cross = torch.cat([part.float() @ A.t() for part in weight.split(rows)])
    # One pass over (out, rank): 2 s W A^T + s^2 B (A A^T), then its product with B.
    cross = torch.addmm(cross, B, A @ A.t(), beta=2 * scaling, alpha=scaling**2)
    return (squared_norms + (cross * B).sum(1)).clamp_min(torch.finfo(torch.float32).tiny).sqrt()


class Magnitude(nn.Module):
    """What DoRA adds to LoRA: a trained magnitude per output feature, and the norms it is measured against."""

    base_squared_norms: Tensor
    scaling: float

    def add_magnitude(self, out_features: int, device: torch.device) -> None:
        self.lora_magnitude_vector = nn.Parameter(torch.empty(out_features, device=device, dtype=torch.float32))
        squared_norms = torch.empty(out_features, device=device, dtype=torch.float32)
        self.register_buffer("base_squared_norms", squared_norms, persistent=False)
        self._inference_norms: tuple[tuple[int, ...], Tensor] | None = None
        self.reset_magnitude()

    def base_weight(self) -> Tensor:
        """W, (out, in)."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B (out, rank)."""
        raise NotImplementedError

    @torch.no_grad()
    def reset_magnitude(self) -> None:
        if self.lora_magnitude_vector.is_meta:
            return
        self._inference_norms = None
        self.base_squared_norms.copy_(squared_row_norms(self.base_weight()))
        self.lora_magnitude_vector.copy_(self.weight_norms())

    @torch.no_grad()
    def weight_norms(self) -> Tensor:
        """Row norms of W + scaling * B A, fp32, (out_features,)."""
        return adapted_row_norms(self.base_weight(), self.base_squared_norms, *self.factors(), self.scaling)

    def gain(self) -> Tensor:
        """m / n, (out_features,): the gradient reaches m only.

        While text is generated n is computed once: it costs a pass over W, which is all that a single token costs.
        """
        if self.training or torch.is_grad_enabled():
            if self._inference_norms is not None:  # no assignment where there is none to make: it would break a graph
                self._inference_norms = None
            return self.lora_magnitude_vector / self.weight_norms()
        versions = tuple(factor._version for factor in self.factors())
        if self._inference_norms is None or self._inference_norms[0] != versions:
            self._inference_norms = (versions, self.weight_norms())
        return self.lora_magnitude_vector / self._inference_norms[1]


class DoRALinear(Magnitude, LoRALinear):
    """y = m / n * (W x + scaling * B A x),  n = row norms of W + scaling * B A   (eq. 5).

    m is `lora_magnitude_vector` (out_features,), fp32, and starts at n, so that the layer starts as its base. n is a
    constant in the backward pass (section 4.3). The bias is outside, added once. As in HF, with dropout the term
    (m / n - 1) W x sees the dropped input too.
    """

    def __init__(self, base_layer: nn.Module, *args: Any, **options: Any):
        super().__init__(base_layer, *args, **options)
        self.add_magnitude(self.lora_B.weight.shape[0], self.lora_B.weight.device)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "lora_magnitude_vector"):
            self.reset_magnitude()

    def set_factors(self, A: Tensor, B: Tensor) -> None:
        super().set_factors(A, B)
        if hasattr(self, "lora_magnitude_vector"):
            self.reset_magnitude()

    def base_weight(self) -> Tensor:
        return dense_weight(self.base_layer)

    def factors(self) -> tuple[Tensor, Tensor]:
        return LoRALinear.factors(self)

    def adapt(self, x: Tensor, base_output: Tensor) -> Tensor:
        dropped, frozen = x, base_output
        if self.active_dropout:
            dropped = F.dropout(x, self.dropout)
            frozen = self.base_layer(dropped)
        bias = self.base_layer.bias
        if isinstance(bias, Tensor):
            frozen = frozen - bias
        low_rank = self.low_rank_output(dropped.to(frozen.dtype))
        # The gain is near one: gain - 1 keeps the digits that bf16 drops from the gain.
        return base_output + low_rank + (self.gain() - 1).to(frozen.dtype) * (frozen + low_rank)

    def fused(self, x: Tensor, base: Base) -> Tensor | None:
        if self.active_dropout:  # the base is fed the dropped input as well
            return None
        bias = self.base_layer.bias if base.form == GIVEN else None
        assert bias is None or isinstance(bias, Tensor)
        return add_and_scale(base, x, *self.factors(), self.gain(), self.scaling, bias)

    def delta_weight(self) -> Tensor:
        weight = dense_weight(self.base_layer).float()
        return self.gain()[:, None] * (weight + super().delta_weight()) - weight


class DoRAEmbedding(Magnitude, LoRAEmbedding):
    """y = m / n * (W[id] + scaling * B A[:, id]),  n and m over the columns of W: one per embedding dimension."""

    def __init__(self, base_layer: nn.Embedding, *args: Any, **options: Any):
        super().__init__(base_layer, *args, **options)
        self.add_magnitude(base_layer.embedding_dim, base_layer.weight.device)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "lora_magnitude_vector"):
            self.reset_magnitude()

    def base_weight(self) -> Tensor:
        return dense_weight(self.base_layer).t()

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_embedding_A, self.lora_embedding_B

    def adapt(self, x: Tensor, base_output: Tensor) -> Tensor:
        changed = super().adapt(x, base_output)
        return torch.addcmul(changed, changed, (self.gain() - 1).to(changed.dtype))

    def delta_weight(self) -> Tensor:
        weight = dense_weight(self.base_layer).float()
        return self.gain() * (weight + super().delta_weight()) - weight
