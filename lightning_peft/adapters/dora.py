"""DoRA: direction from LoRA, magnitude trained apart (Liu et al. 2024, arXiv:2402.09353)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.adapters import lora
from lightning_peft.adapters.base import Target
from lightning_peft.adapters.lora import LoRAConfig, LoRAEmbedding, LoRAExperts, LoRALinear
from lightning_peft.adapters.method import Contract, Method, linears
from lightning_peft.kernels.frozen_linear import GIVEN, Base
from lightning_peft.kernels.grouped import RowsPerExpert
from lightning_peft.kernels.low_rank import add_and_scale, scaled_sum
from lightning_peft.kernels.row_norms import takes_norms
from lightning_peft.quantization.experts import ExpertLinear, QuantizedExperts
from lightning_peft.quantization.weights import dense_weight

ROWS_AT_ONCE = 2**24
"""Elements of the base weight held in fp32 at a time while norms are taken."""


@dataclass
class DoRAConfig(LoRAConfig):
    method: str = "dora"


def squared_row_norms(weight: Tensor) -> Tensor:
    """Return the squared norms of the rows of (out, in), fp32, (out,)."""
    rows = max(1, ROWS_AT_ONCE // weight.shape[1])
    return torch.cat([part.float().square().sum(1) for part in weight.split(rows)])


def adapted_row_norms(weight: Tensor, squared_norms: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Return the row norms of W + s B A, fp32, (out,), without forming B A.

    n^2 = ||W||^2 + 2 s <B, W A^T> + s^2 <B A A^T, B>, inner products by row; `squared_norms` is the first term. On CUDA
    a kernel takes the sum's own norms, in one pass over W.
    """
    A, B = A.float(), B.float()
    if takes_norms(weight):
        return torch.ops.lightning_peft.row_norms(weight, A, B, scaling)
    rows = max(1, ROWS_AT_ONCE // weight.shape[1])
    cross = torch.cat([part.float() @ A.t() for part in weight.split(rows)])
    # 2 s W A^T + s^2 B (A A^T) takes one pass over (out, rank), then comes its product with B.
    cross = torch.addmm(cross, B, A @ A.t(), beta=2 * scaling, alpha=scaling**2)
    return (squared_norms + (cross * B).sum(1)).clamp_min(torch.finfo(torch.float32).tiny).sqrt()


class RowNorms(nn.Module):
    """Row norms of W + scaling * B A, fp32, (out_features,), from the squared norms of W, which it keeps."""

    squared: Tensor

    def __init__(self, out_features: int, device: torch.device):
        super().__init__()
        self.register_buffer("squared", torch.empty(out_features, device=device), persistent=False)
        self.kept: tuple[tuple[int, ...], Tensor] | None = None
        self.of_step: Tensor | None = None
        """The norms that the forward pass under way was begun with."""

    @torch.no_grad()
    def measure(self, weight: Tensor) -> None:
        """Keep the squared norms of W (out_features, in_features)."""
        self.kept = self.of_step = None
        self.squared.copy_(squared_row_norms(weight))

    @torch.no_grad()
    def forward(self, weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        return adapted_row_norms(weight, self.squared, A, B, scaling)

    def once(self, norms: Callable[[], Tensor], factors: tuple[Tensor, Tensor]) -> Tensor:
        """Return `norms()`, taken once while text is generated and the factors stand still.

        The norms cost a pass over W, which is all that a single token costs. In a training step the norms are those
        taken when its forward pass began; the factors move after the pass, so no other caller is given these.
        """
        if self.training or torch.is_grad_enabled():
            if self.kept is not None:  # no assignment where there is none to make: it would break a graph
                self.kept = None
            is_step = self.of_step is not None and self.training and torch.is_grad_enabled()
            return self.of_step if is_step else norms()  # type: ignore[return-value]  # not None there
        versions = tuple(factor._version for factor in factors)
        if self.kept is None or self.kept[0] != versions:
            self.kept = (versions, norms())
        return self.kept[1]


class DoRALinear(LoRALinear):
    """y = m / n * (W x + scaling * B A x),  n = row norms of W + scaling * B A   (eq. 5).

    m is `lora_magnitude_vector` (out_features,), fp32, and starts at n, so that the layer starts as its base. n is a
    constant in the backward pass (section 4.3). The bias is outside, added once. As in HF, with dropout the term
    (m / n - 1) W x sees the dropped input too.
    """

    def __init__(self, base_layer: nn.Module, target: Target, config: DoRAConfig):
        super().__init__(base_layer, target, config)
        device = self.lora_B.weight.device
        self.lora_magnitude_vector = nn.Parameter(torch.empty(self.lora_B.out_features, device=device))
        self.norms = RowNorms(self.lora_B.out_features, device)

    @torch.no_grad()
    def set_factors(self, A: Tensor, B: Tensor) -> None:
        super().set_factors(A, B)
        self.norms.measure(dense_weight(self.base_layer))
        self.lora_magnitude_vector.copy_(self.weight_norms())

    def weight_norms(self) -> Tensor:
        """Return n, fp32, (out_features,)."""
        return self.norms(dense_weight(self.base_layer), *self.factors(), self.scaling)

    def gain(self) -> Tensor:
        """Return m / n, (out_features,): the gradient reaches m only."""
        return self.lora_magnitude_vector / self.norms.once(self.weight_norms, self.factors())

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
        return base_output + (low_rank + (self.gain() - 1).to(frozen.dtype) * (frozen + low_rank))

    def fused(self, x: Tensor, base: Base) -> Tensor | None:
        if self.active_dropout:  # the base is fed the dropped input as well
            return None
        bias = self.base_layer.bias if base.form == GIVEN else None
        assert bias is None or isinstance(bias, Tensor)
        return add_and_scale(base, x, *self.factors(), self.gain(), self.scaling, bias)

    def summed_base(self, base: Base) -> Base:
        return base._replace(tensors=(*base.tensors[:-1], None))

    def of_sum(self, total: Tensor) -> Tensor:
        bias = self.base_layer.bias
        assert bias is None or isinstance(bias, Tensor)
        return scaled_sum(total, self.gain(), bias)

    def before_step(self) -> None:
        self.norms.of_step = self.weight_norms()

    def delta_weight(self) -> Tensor:
        weight = dense_weight(self.base_layer).float()
        gain = self.lora_magnitude_vector / self.weight_norms()
        return gain[:, None] * (weight + super().delta_weight()) - weight

    def low_rank(self) -> None:
        """Return None: the gain scales the base's own rows too."""


class DoRAEmbedding(LoRAEmbedding):
    """y = m / n * (W[id] + scaling * B A[:, id]),  n and m over the columns of W: one per embedding dimension."""

    def __init__(self, base_layer: nn.Embedding, target: Target, config: DoRAConfig):
        super().__init__(base_layer, target, config)
        device = base_layer.weight.device
        self.lora_magnitude_vector = nn.Parameter(torch.empty(base_layer.embedding_dim, device=device))
        self.norms = RowNorms(base_layer.embedding_dim, device)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        if not self.lora_magnitude_vector.is_meta:
            self.norms.measure(dense_weight(self.base_layer).t())
            self.lora_magnitude_vector.copy_(self.weight_norms())

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A (rank, num_embeddings) and B (dim, rank)."""
        return self.lora_embedding_A, self.lora_embedding_B

    def weight_norms(self) -> Tensor:
        """Return n, fp32, (dim,)."""
        return self.norms(dense_weight(self.base_layer).t(), *self.factors(), self.scaling)

    def gain(self) -> Tensor:
        """Return m / n, (dim,): the gradient reaches m only."""
        return self.lora_magnitude_vector / self.norms.once(self.weight_norms, self.factors())

    def adapt(self, x: Tensor, base_output: Tensor) -> Tensor:
        changed = super().adapt(x, base_output)
        return torch.addcmul(changed, changed, (self.gain() - 1).to(changed.dtype))

    def delta_weight(self) -> Tensor:
        weight = dense_weight(self.base_layer).float()
        return self.gain() * (weight + super().delta_weight()) - weight

    def low_rank(self) -> None:
        """Return None: the gain scales the base's own columns too."""


class DoRAExperts(LoRAExperts):
    """y_e = m_e / n_e * (W_e x + scaling * B_e A_e x) for the rows of each expert e, n_e the row norms of its own sum.

    m is `lora_magnitude_vector` (experts, out_features), fp32. The bias that a model adds to an expert's output
    comes after the gain. Under dropout only A sees the dropped input.
    """

    def __init__(self, base_layer: ExpertLinear | QuantizedExperts, target: Target, config: DoRAConfig):
        super().__init__(base_layer, target, config)
        experts, out_features, _ = base_layer.shape
        device = self.lora_B.device
        self.lora_magnitude_vector = nn.Parameter(torch.empty(experts, out_features, device=device))
        self.norms = nn.ModuleList(RowNorms(out_features, device) for _ in range(experts))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.lora_A.is_meta:
            return
        for expert, norms in enumerate(self.norms):
            norms.measure(self.base_layer.matrix(expert))  # type: ignore[operator]  # a list of `RowNorms`
        self.lora_magnitude_vector.copy_(self.weight_norms())

    def weight_norms(self) -> Tensor:
        """Return n of every expert, fp32, (experts, out_features)."""
        pairs = zip(self.norms, self.each_A(self.lora_A), self.lora_B, strict=True)
        return torch.stack([n(self.base_layer.matrix(e), A, B, self.scaling) for e, (n, A, B) in enumerate(pairs)])

    def gain(self) -> Tensor:
        """Return m / n, (experts, out_features): the gradient reaches m only."""
        first: Any = self.norms[0]
        return self.lora_magnitude_vector / first.once(self.weight_norms, (self.lora_A, self.lora_B))

    def forward(self, x: Tensor, sizes: Sequence[int]) -> Tensor:  # type: ignore[override]
        """Map rows sorted by expert, `sizes` of them for each, (N, in_features), to (N, out_features)."""
        changed = super().forward(x, sizes)
        if not self.enabled:
            return changed
        if isinstance(sizes, RowsPerExpert):
            experts = sizes.sorted_ids
        else:
            experts = torch.arange(len(sizes), device=x.device).repeat_interleave(
                torch.tensor(list(sizes), device=x.device), output_size=len(x)
            )
        return torch.addcmul(changed, changed, (self.gain() - 1).to(changed.dtype).index_select(0, experts))

    def adapt(self, x: Tensor, base_output: Tensor) -> Tensor:
        """Return the formula for as many rows of each expert: (experts, N, in_features), (experts, N, out_features)."""
        changed = super().adapt(x, base_output)
        return torch.addcmul(changed, changed, (self.gain() - 1).to(changed.dtype)[:, None])

    def delta_weight(self) -> Tensor:
        weight = dense_weight(self.base_layer).float()
        return self.gain()[..., None] * (weight + super().delta_weight()) - weight


METHOD = Method(
    DoRAConfig,
    {
        **linears(DoRALinear),
        nn.Embedding: DoRAEmbedding,
        ExpertLinear: DoRAExperts,
        QuantizedExperts: DoRAExperts,
    },
    trained=(*lora.METHOD.trained, "lora_magnitude_vector"),
    change="m (W + s B A) / norm of its rows",
    paper="arXiv:2402.09353",
    count="r (d + k) + d",
    peft=replace(lora.PEFT, tensors=(*lora.PEFT.tensors, "lora_magnitude_vector"), flags={"use_dora": True}),
    contract=Contract(trained=lambda t: t.rank * (t.out_features + t.in_features) + t.out_features),
)
