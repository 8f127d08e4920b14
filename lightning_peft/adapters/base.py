"""The interface of every adapter method: a frozen layer with a small trainable change around it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from lightning_peft.adapters.bias import Bias
from lightning_peft.adapters.initialization import INITS, Initialization
from lightning_peft.kernels.frozen_linear import Base, given
from lightning_peft.kernels.low_rank import add_low_rank
from lightning_peft.quantization.frozen_base import frozen_base
from lightning_peft.quantization.weights import dense_weight, is_quantized, is_transposed


class NotMergeableError(ValueError):
    """The adapter cannot be written into its base weight."""


@dataclass(frozen=True)
class Target:
    """One layer to be adapted, as the matcher found it."""

    name: str
    out_features: int
    in_features: int
    rank: int | None
    alpha: float | None
    depth: int | None
    """Index of the transformer block, None outside the blocks."""
    experts: int = 0
    """Matrices of this shape in a stack of experts; 0 for a layer of one."""


class LowRank(NamedTuple):
    """The change scaling * B A to a weight, fp32 and detached: what every serving engine can compute."""

    A: Tensor
    """(rank, in_features); (rank, num_embeddings) of an embedding."""
    B: Tensor
    """(out_features, rank); (dim, rank) of an embedding."""
    scaling: float


@dataclass
class AdapterConfig:
    """The options all methods share: where the adapters go and how large they are."""

    method: str = ""
    """A key of `METHODS`; set by the option file."""
    target_modules: Any = "all_linear"
    """A preset (all_linear, attention, mlp, query_value), or a list of names, globs and `re:` patterns."""
    exclude_modules: list[str] = field(default_factory=list)
    """Names, globs and `re:` patterns never adapted."""
    layers: str | None = None
    """Transformer blocks to adapt, as in "0-3,7,10-"; all when null."""
    rank: int | None = 16
    """Inner dimension; null for methods without one."""
    alpha: float | None = None
    """Numerator of the scaling; 2 x rank when null."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Rank per pattern, as in {q_proj:8,layers.1.*:4} (a colon in a re: pattern is typed \\:); the last match wins."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Alpha per pattern, likewise."""
    experts: Any = "none"
    """Rank of every expert's matrices in a mixture of experts; auto is `rank` over the experts of a token, none leaves
    them as they are unless `target_modules` names them."""
    rank_last: int | None = None
    """Rank of the last block when ranks are tapered linearly by depth from `rank`; null: one rank for all."""
    trainable_modules: list[str] = field(default_factory=list)
    """Modules trained in full beside the adapters, such as embed_tokens, lm_head or norms."""
    untie_embeddings: bool = False
    """Give the output head a weight of its own where it shares the embedding's and only one of them changes."""
    init_from: str | None = None
    """An adapter folder whose weights are the start (a warm start)."""

    uses_rank: ClassVar[bool] = True
    uses_alpha: ClassVar[bool] = True
    rank_costs_parameters: ClassVar[bool] = True
    """True where a rank above a layer's smaller side is a waste worth a warning."""

    def __post_init__(self) -> None:
        for key, rank in [("rank", self.rank), ("rank_last", self.rank_last), *self.rank_pattern.items()]:
            if rank is not None and rank < 1:
                raise ValueError(f"adapter.{key}={rank}: a rank is at least 1 (rank=none for methods without one)")
        if self.experts not in (None, "none", "auto") and not (type(self.experts) is int and self.experts >= 1):
            raise ValueError(f"adapter.experts={self.experts}: must be none, auto or a rank of at least 1")
        if self.uses_rank and self.rank is None:
            raise ValueError(f"adapter.rank=null: method {self.method!r} needs a rank, for example rank=r16")
        if not self.uses_rank and self.rank is not None:
            raise ValueError(f"adapter.rank={self.rank}: method {self.method!r} has no rank; use rank=none")
        if not self.uses_rank and (self.rank_pattern or self.rank_last):
            raise ValueError(f"adapter.rank_pattern and rank_last: method {self.method!r} has no rank")
        if not self.uses_alpha and (self.alpha is not None or self.alpha_pattern):
            raise ValueError(f"adapter.alpha={self.alpha}: method {self.method!r} has no scaling; leave it null")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"adapter.alpha={self.alpha}: must be above 0, or null for 2 x rank")

    @property
    def largest_rank(self) -> int | None:
        """Return the largest rank that a layer may have, patterns included; None for a method without one."""
        ranks = (self.rank, self.rank_last, *self.rank_pattern.values())
        return max((rank for rank in ranks if rank is not None), default=None)

    @property
    def initialization(self) -> Initialization:
        """Return the row of `INITS` the layers start by."""
        return INITS[self.init_name]

    @property
    def init_name(self) -> str:
        """Return a key of `INITS`; a method with a start of its own reads shapes alone, as kaiming does."""
        return "kaiming"

    @property
    def rank_within_layer(self) -> bool:
        """Return whether a rank above a layer's smaller side is an error rather than a waste."""
        return self.initialization.bounds_rank

    @property
    def rank_growth(self) -> float:
        """Return the factor by which a layer's rank may grow when an initialisation spreads ranks over the layers."""
        return 1.0

    @property
    def tied(self) -> tuple[str, ...]:
        """Return the names of the parameters that all layers have in common, as one."""
        return ()

    @property
    def trained_biases(self) -> Bias:
        """Return the biases of the base that train beside the adapters."""
        return Bias.none


class StepSchedule(Protocol):
    """A change to the adapters between optimiser steps, with a state that a checkpoint keeps."""

    def after_step(self, step: int) -> None:
        """Act after optimiser step `step` (from 1), on every rank, while the gradients are there."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class SharedOutputs(Protocol):
    """Layers that read one input and are computed together."""

    def output(self, place: int, x: Tensor) -> Tensor | None:
        """Return the output of the layer at a place; None where it has to compute it by itself."""


class Adapter(nn.Module, ABC):
    """A frozen layer with a small trainable change around it.

    `adapt` is the method's formula, from the input and the base's output, so that several adapters can share one base
    forward. `fused` gives the same in one step of a kernel; `forward` picks it wherever there is one.
    """

    mergeable: ClassVar[bool] = True
    initialization: Initialization = INITS["kaiming"]
    """The row of `INITS` the layer starts by."""
    dropout: float = 0.0
    """Probability of dropping an input of the change, for methods that drop."""
    scaling: float = 1.0
    """The factor before `product`."""

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.enabled = True
        self.shared_input: tuple[SharedOutputs, int] | None = None
        """The layers that are computed together with this one, and its place among them."""

    def __getattr__(self, name: str) -> Any:
        """Return what the base layer has: models read sizes, scales and even weights of their layers.

        `weight` is the sum of base and change, through which gradients reach the adapter: where a model multiplies with
        it by itself, as Mamba does, the layer is adapted all the same. The sum is computed anew each time, without
        dropout.
        """
        base_layer = self.__dict__.get("_modules", {}).get("base_layer")
        if name.startswith("_") or base_layer is None or name in self.__dict__["_modules"]:
            return super().__getattr__(name)
        for own in (self.__dict__["_parameters"], self.__dict__["_buffers"]):
            if name in own:
                return own[name]
        if name == "weight":
            return self._whole_weight(base_layer)
        if name == "bias" and self.enabled and (change := self.delta_bias()) is not None:
            return (base_layer.bias.float() + change).to(base_layer.bias.dtype)
        return getattr(base_layer, name)

    def _whole_weight(self, base_layer: nn.Module) -> Tensor:
        if not self.enabled:
            return dense_weight(base_layer) if is_quantized(base_layer) else base_layer.weight  # type: ignore[return-value]
        weight = dense_weight(base_layer)
        whole = (weight.float() + self.delta_weight()).to(weight.dtype)
        return whole.mT if is_transposed(base_layer) else whole

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features); ids (...) to (..., dim) around an embedding."""
        if not self.enabled:
            return self.base_layer(x)
        if self.shared_input is not None:
            group, place = self.shared_input
            if (shared := group.output(place, x)) is not None:
                return shared
        base = frozen_base(self.base_layer, x)
        output = None if base is None else self.fused(x, base)
        return output if output is not None else self.adapted_output(x, self.base_layer(self.base_input(x)))

    def adapted_output(self, x: Tensor, base_output: Tensor) -> Tensor:
        """Return the adapted output of a base that was run before; its output may be overwritten."""
        output = self.fused(x, given(base_output))
        return self.adapt(x, base_output) if output is None else output

    def fused(self, x: Tensor, base: Base) -> Tensor | None:
        """Return the adapted output in one step of a kernel, over a base to run or the output of one; None without one.

        In 16 bits the kernel adds the change in fp32: a young adapter's is below what rounding the base's output loses.
        """
        factors = self.product()
        if factors is None:
            return None
        return add_low_rank(base, x, *factors, self.scaling, self.active_dropout)

    def product(self) -> tuple[Tensor, Tensor] | None:
        """Return A (rank, in_features) and B (out_features, rank) of a layer whose output is, and is no more than, the
        base's plus `scaling` * B A dropout(x); gradients reach what trains through them. Return None for any other
        layer.
        """
        return None

    @classmethod
    def is_product(cls) -> bool:
        """Return whether layers of this class are what `product` says, so that several can share one base's product."""
        own = (cls.forward, cls.fused, cls.adapted_output, cls.base_input)
        return cls.product is not Adapter.product and own == (
            Adapter.forward, Adapter.fused, Adapter.adapted_output, Adapter.base_input,
        )  # fmt: skip

    @property
    def active_dropout(self) -> float:
        """Return the probability of dropping an input now: 0 outside training."""
        return self.dropout if self.training else 0.0

    def base_input(self, x: Tensor) -> Tensor:
        """Return what the base layer is fed; a method that scales its inputs overrides this."""
        return x

    @abstractmethod
    def adapt(self, x: Tensor, base_output: Tensor) -> Tensor:
        """Return the adapted output (..., out_features) from the input and the base's output: the method's formula."""

    @abstractmethod
    def delta_weight(self) -> Tensor:
        """Return merged minus base weight, fp32, in the shape `dense_weight(base_layer)` has."""

    def delta_bias(self) -> Tensor | None:
        """Return merged minus base bias, fp32, or None."""
        return None

    def low_rank(self) -> LowRank | None:
        """Return the whole change to the base as published as a low-rank sum; None where it is none."""
        return None

    @abstractmethod
    def reset_parameters(self) -> None:
        """Take fresh initial values; may read `base_layer`. The injector calls it once the layer is made."""

    def start_from(self, matrix: Tensor, rank: int | None = None) -> None:
        """Start from the matrix that `initialization` reads, at another rank where one is given."""
        raise NotImplementedError(f"{type(self).__name__} starts by itself")

    def taken_from_base(self) -> Tensor | None:
        """Return what the start took out of the base weight, fp32 in the shape of `delta_weight`, or None."""
        return None

    @property
    def rewrote_base(self) -> bool:
        """Return whether the start took a part of the base weight out of it."""
        return self.taken_from_base() is not None

    def published(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this layer's tensors, whole and by name, as its folder has them: around the untouched base."""
        return tensors

    def fit_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the shapes of a checkpoint's tensors of this layer, by name, where a run may have changed its own."""

    def schedule_state(self) -> list[Tensor]:
        """Return one tensor in the shape and dtype of each that the method's schedule remembers for this layer."""
        return []

    def regularization(self) -> Tensor | None:
        """Return the extra loss of this layer, or None; the model's is the mean over its layers."""
        return None

    def check_mergeable(self) -> None:
        """Raise NotMergeableError when the change cannot be written into the base weight."""
        if not self.mergeable:
            raise NotMergeableError(f"{type(self).__name__} cannot be merged into a weight: serve it unmerged")
