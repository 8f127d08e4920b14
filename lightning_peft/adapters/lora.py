"""LoRA: a low-rank change beside a frozen layer (Hu et al. 2021, arXiv:2106.09685)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter, AdapterConfig, LowRank, Target
from lightning_peft.adapters.bias import Bias
from lightning_peft.adapters.initialization import INITS, Reads, Start, kaiming
from lightning_peft.adapters.method import Contract, Method, PeftSpelling, Shapes, linears
from lightning_peft.kernels.frozen_linear import Base
from lightning_peft.kernels.grouped import grouped_product
from lightning_peft.quantization.experts import ExpertLinear, QuantizedExperts, product_dtype
from lightning_peft.quantization.weights import dense_weight, linear_shape, write_weight


@dataclass
class LoRAConfig(AdapterConfig):
    method: str = "lora"
    dropout: float = 0.0
    """Probability of dropping an input of A."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732)."""
    init: str = "kaiming"
    """Start of A and B: a key of `INITS`."""
    bias: Bias = Bias.none
    """Biases of the base trained as well: none, all, or lora_only for those of the adapted layers."""
    experts_share_A: bool = False
    """Give the experts of a stack one A together, and a B each: half of their parameters where the sides are alike."""
    eva_rho: float = 2.0
    """With init=eva, the most a layer's rank may grow when ranks go where they explain most; 1 keeps them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init not in INITS:
            raise ValueError(f"adapter.init={self.init}: must be one of {', '.join(INITS)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"adapter.dropout={self.dropout}: must be in [0, 1)")
        if not self.eva_rho >= 1:
            raise ValueError(f"adapter.eva_rho={self.eva_rho}: must be at least 1")

    @property
    def init_name(self) -> str:
        return self.init

    @property
    def rank_growth(self) -> float:
        return self.eva_rho

    @property
    def trained_biases(self) -> Bias:
        return self.bias

    def scaling(self, rank: int, alpha: float) -> float:
        """Return the factor before B A."""
        return alpha / rank**0.5 if self.rank_stabilized else alpha / rank


class LoRALinear(Adapter):
    """y = W x + scaling * B A dropout(x),  scaling = alpha / rank   (eq. 3 and section 4.1).

    A is (rank, in_features), B is (out_features, rank), both fp32 whatever the base computes in. With the default
    init A is Kaiming-uniform and B zero, so the layer starts as its base. Wraps nn.Linear, its quantised counterpart
    and GPT-2's Conv1D.
    """

    initial_A: Tensor | None
    initial_B: Tensor | None
    """A and B at the start, when the initialisation took them out of the base weight."""

    def __init__(self, base_layer: nn.Module, target: Target, config: LoRAConfig):
        super().__init__(base_layer)
        assert target.rank is not None and target.alpha is not None
        out_features, in_features = linear_shape(base_layer)
        device = next(base_layer.parameters()).device
        self.rank = target.rank
        self.scaling = config.scaling(target.rank, target.alpha)
        self.dropout = config.dropout
        self.init, self.initialization = config.init, config.initialization
        self.lora_A = nn.Linear(in_features, self.rank, bias=False, device=device, dtype=torch.float32)
        self.lora_B = nn.Linear(self.rank, out_features, bias=False, device=device, dtype=torch.float32)
        self.register_buffer("initial_A", None, persistent=False)
        self.register_buffer("initial_B", None, persistent=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.lora_A.weight.is_meta:
            return
        reads = self.initialization.reads
        if reads is Reads.weight:
            self.start_from(self.untouched_weight())
            return
        start = self.initialization.start if reads is Reads.shape else kaiming
        shape = self.lora_A.weight.new_empty(()).expand(self.lora_B.out_features, self.lora_A.in_features)
        self._take(start(shape, self.rank, self.scaling))

    @torch.no_grad()
    def start_from(self, matrix: Tensor, rank: int | None = None) -> None:
        start = self.initialization.start(matrix, rank or self.rank, self.scaling)
        if start.from_base:
            assert start.B is not None
            self.initial_A, self.initial_B = start.A.clone(), start.B.clone()
            # A quantised base stores the nearest codes to what is left.
            write_weight(self.base_layer, matrix - self.scaling * (start.B @ start.A), requantize=True)
        self._take(start)

    def _take(self, start: Start) -> None:
        B = self.lora_B.weight.new_zeros(self.lora_B.out_features, len(start.A)) if start.B is None else start.B
        self.set_factors(start.A, B)

    def untouched_weight(self) -> Tensor:
        """Return the base weight before an initialisation rewrote it, fp32."""
        weight = dense_weight(self.base_layer).float()
        return weight if (taken := self.taken_from_base()) is None else weight + taken

    def taken_from_base(self) -> Tensor | None:
        if self.initial_A is None or self.initial_B is None:
            return None
        return self.scaling * (self.initial_B.float() @ self.initial_A.float())

    def published(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return [A; A_0] and [B, -B_0], of twice the rank, for a rewritten base: a LoRA with the same scaling."""
        if self.initial_A is None or self.initial_B is None:
            return tensors
        A, B = tensors["lora_A.weight"], tensors["lora_B.weight"]
        doubled_A = torch.cat([A, self.initial_A.to(A.device)])
        doubled_B = torch.cat([B, -self.initial_B.to(B.device)], dim=1)
        return {**tensors, "lora_A.weight": doubled_A, "lora_B.weight": doubled_B}

    def fit_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the ranks of the checkpoint where the initialisation spread them after the injection."""
        A, B = state.get("lora_A.weight"), state.get("lora_B.weight")
        if self.initialization.spreads_ranks and A is not None and B is not None and len(A) != self.rank:
            device = self.lora_A.weight.device
            self.set_factors(A.to(device), B.to(device))

    @torch.no_grad()
    def set_factors(self, A: Tensor, B: Tensor) -> None:
        """Take these values of A (rank, in_features) and B (out_features, rank); another rank keeps the scaling."""
        if A.shape[0] != self.rank:
            self.rank = self.lora_A.out_features = self.lora_B.in_features = A.shape[0]
            self.lora_A.weight = nn.Parameter(torch.empty(A.shape, device=A.device))
            self.lora_B.weight = nn.Parameter(torch.empty(B.shape, device=B.device))
        self.lora_A.weight.copy_(A)
        self.lora_B.weight.copy_(B)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A (rank, in_features) and B (out_features, rank), in the form that the products take."""
        return self.lora_A.weight, self.lora_B.weight

    def adapt(self, x: Tensor, base_output: Tensor) -> Tensor:
        dropped = F.dropout(x, self.dropout, self.training)
        return base_output + self.low_rank_output(dropped.to(base_output.dtype))

    def low_rank_output(self, x: Tensor) -> Tensor:
        """Return scaling * B A x, in the dtype of x."""
        A, B = (factor.to(x.dtype) for factor in self.factors())
        return self.scaling * (x @ A.t() @ B.t())

    def product(self) -> tuple[Tensor, Tensor] | None:
        return self.factors()

    def summed_base(self, base: Base) -> Base:
        """Return the part of the base that `of_sum` is given the sum of: all of it, or its weight alone."""
        return base

    def of_sum(self, total: Tensor) -> Tensor:
        """Return the layer's output (..., out_features) from its base plus scaling * B A x, as groups compute it."""
        return total

    def before_step(self) -> None:
        """Keep the values that stand still while a training step runs forward."""

    def delta_weight(self) -> Tensor:
        return self.scaling * (self.lora_B.weight.float() @ self.lora_A.weight.float())

    def low_rank(self) -> LowRank | None:
        own = {"lora_A.weight": self.lora_A.weight.detach(), "lora_B.weight": self.lora_B.weight.detach()}
        tensors = self.published(own)
        return LowRank(tensors["lora_A.weight"].float(), tensors["lora_B.weight"].float(), self.scaling)


class LoRAEmbedding(Adapter):
    """y = W[id] + scaling * B A[:, id]   around an embedding (reference code of the paper).

    lora_embedding_A is (rank, num_embeddings), zero; lora_embedding_B is (dim, rank), standard normal.
    """

    def __init__(self, base_layer: nn.Embedding, target: Target, config: LoRAConfig):
        super().__init__(base_layer)
        if not config.initialization.is_neutral:
            raise ValueError(
                f"adapter.init={config.init} is not defined for embeddings: use kaiming or exclude the embedding"
            )
        assert target.rank is not None and target.alpha is not None
        device = base_layer.weight.device
        self.rank = rank = target.rank
        self.scaling = config.scaling(target.rank, target.alpha)
        self.lora_embedding_A = nn.Parameter(
            torch.empty(rank, base_layer.num_embeddings, device=device, dtype=torch.float32)
        )
        self.lora_embedding_B = nn.Parameter(
            torch.empty(base_layer.embedding_dim, rank, device=device, dtype=torch.float32)
        )

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.lora_embedding_A)
        nn.init.normal_(self.lora_embedding_B)

    def adapt(self, x: Tensor, base_output: Tensor) -> Tensor:
        inner = F.embedding(x, self.lora_embedding_A.t()).to(base_output.dtype)
        return base_output + self.scaling * (inner @ self.lora_embedding_B.t().to(base_output.dtype))

    def delta_weight(self) -> Tensor:
        return self.scaling * (self.lora_embedding_B.float() @ self.lora_embedding_A.float()).t()

    def low_rank(self) -> LowRank | None:
        A, B = self.lora_embedding_A.detach().float(), self.lora_embedding_B.detach().float()
        return LowRank(A, B, self.scaling)


class LoRAExperts(Adapter):
    """y_e = W_e x + scaling * B_e A_e dropout(x) for the rows x of each expert e: factors of its own for every expert.

    lora_A is (experts, rank, in_features), or (1, rank, in_features) where the experts share it, and lora_B
    (experts, out_features, rank), both fp32. Wraps a stack of matrices, dense or coded, and multiplies an expert's
    factors with that expert's rows alone.
    """

    base_layer: ExpertLinear | QuantizedExperts

    def __init__(self, base_layer: ExpertLinear | QuantizedExperts, target: Target, config: LoRAConfig):
        super().__init__(base_layer)
        if not config.initialization.is_neutral:
            raise ValueError(
                f"adapter.init={config.init} is not defined for stacked experts: use kaiming or adapter.experts=none"
            )
        assert target.rank is not None and target.alpha is not None
        experts, out_features, in_features = base_layer.shape
        self.rank = target.rank
        self.scaling = config.scaling(target.rank, target.alpha)
        self.dropout = config.dropout
        self.initialization = config.initialization
        device = base_layer.weight.device
        matrices = 1 if config.experts_share_A else experts
        self.lora_A = nn.Parameter(torch.empty(matrices, self.rank, in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.empty(experts, out_features, self.rank, device=device, dtype=torch.float32))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.lora_A.is_meta:
            return
        shape = self.lora_A.new_empty(()).expand(self.lora_B.shape[1], self.lora_A.shape[2])
        for A in self.lora_A:
            A.copy_(self.initialization.start(shape, self.rank, self.scaling).A)
        self.lora_B.zero_()

    def forward(self, x: Tensor, sizes: Sequence[int]) -> Tensor:  # type: ignore[override]
        """Map rows sorted by expert, `sizes` of them for each, (N, in_features), to (N, out_features)."""
        if not self.enabled:
            return self.base_layer(x, sizes)
        base = partial(self.base_layer.base, dtype=product_dtype(x))
        factors = (self.each_A(self.lora_A), self.lora_B)
        stack = self.base_layer.matrices() if isinstance(self.base_layer, ExpertLinear) else None
        return grouped_product(x, sizes, base, factors, self.scaling, self.active_dropout, stack)

    def each_A(self, A: Tensor) -> Tensor:
        """Return A of every expert, (experts, rank, in_features), a view where they share one."""
        return A.expand(self.base_layer.shape[0], -1, -1)

    def published(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return an A for every expert, as HF PEFT has them."""
        return {**tensors, "lora_A": self.each_A(tensors["lora_A"]).clone()} if "lora_A" in tensors else tensors

    def adapt(self, x: Tensor, base_output: Tensor) -> Tensor:
        """Return the formula for as many rows of each expert: (experts, N, in_features), (experts, N, out_features)."""
        A, B = (factor.to(base_output.dtype) for factor in (self.lora_A, self.lora_B))
        dropped = F.dropout(x, self.dropout, self.training).to(base_output.dtype)
        return base_output + self.scaling * (dropped @ A.mT @ B.mT)

    def delta_weight(self) -> Tensor:
        return self.scaling * (self.lora_B.float() @ self.lora_A.float())


def read_lora_words(words: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """Read an initialisation that rewrote the base."""
    init = words.get("init_lora_weights")
    return {"init": init} if init in INITS and INITS[init].rewrites_base else {}


PEFT = PeftSpelling(
    "LORA",
    ("lora_A.weight", "lora_embedding_A", "lora_B.weight", "lora_embedding_B"),
    {"dropout": "lora_dropout", "rank_stabilized": "use_rslora", "bias": "bias"},
    {"use_dora": False},
    # True means "start A and B as usual". Any other initialisation could change the base while PEFT loads.
    {"init_lora_weights": True},
    alpha_word="lora_alpha",
    patterns=("rank_pattern", "alpha_pattern"),
    read_more=read_lora_words,
)

METHOD = Method(
    LoRAConfig,
    {
        **linears(LoRALinear),
        nn.Embedding: LoRAEmbedding,
        ExpertLinear: LoRAExperts,
        QuantizedExperts: LoRAExperts,
    },
    trained=("lora_A.weight", "lora_B.weight"),
    change="s B A, s = alpha / r (rslora: alpha / sqrt(r))",
    paper="arXiv:2106.09685, 2312.03732",
    count="r (d + k)",
    peft=PEFT,
    contract=Contract(trained=lambda t: t.rank * (t.out_features + t.in_features)),
)
