"""The changes of a model's layers taken out of it, and put into it again as another adapter."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter, AdapterConfig, LowRank
from lightning_peft.adapters.dora import DoRAEmbedding, DoRALinear
from lightning_peft.adapters.inject import SHARED, adapters, inject_adapters
from lightning_peft.adapters.lora import LoRAEmbedding, LoRAExperts, LoRALinear
from lightning_peft.adapters.registry import METHODS

Change = LowRank | Tensor
"""The change of one layer, fp32 on the host: a low-rank sum, or a matrix (out_features, in_features)."""
SAME_MAGNITUDE = 1e-6
"""Largest difference of a gain to one that is the rounding of norms in fp32."""


class NotOneMatrixError(ValueError):
    """A layer whose change is more, or other, than that of one weight."""


@torch.no_grad()
def changes_of(model: nn.Module) -> dict[str, Change]:
    """Return the change of every adapted layer, around an embedding with (dim, num_embeddings).

    Raises NotOneMatrixError for a stack of experts and for a changed bias.
    """
    found: dict[str, Change] = {}
    for name, layer in adapters(model):
        low_rank = layer.low_rank()
        if low_rank is None and isinstance(layer, DoRALinear | DoRAEmbedding):
            low_rank = _without_magnitude(layer)
        if low_rank is not None:
            found[name] = LowRank(low_rank.A.cpu(), low_rank.B.cpu(), low_rank.scaling)
            continue
        if isinstance(layer, LoRAExperts):
            raise NotOneMatrixError(f"{name} is a stack of experts, whose matrices are not one")
        if layer.delta_bias() is not None:
            raise NotOneMatrixError(f"{type(layer).__name__} at {name} changes a bias as well")
        change = layer.delta_weight().float().cpu()
        found[name] = change.t() if isinstance(layer.base_layer, nn.Embedding) else change
    return found


def _without_magnitude(layer: DoRALinear | DoRAEmbedding) -> LowRank | None:
    """Return the low-rank sum that a DoRA layer is whose magnitude is still its weight's norm; None for another."""
    if float((layer.gain() - 1).abs().max()) > SAME_MAGNITUDE:
        return None
    A, B = layer.factors()
    return LowRank(A.detach().float(), B.detach().float(), layer.scaling)


def take_out_adapters(model: nn.Module) -> None:
    """Put every base layer in its adapter's place again; a base that an initialisation rewrote stays rewritten."""
    for name, layer in list(adapters(model)):
        model.set_submodule(name, layer.base_layer)
    if hasattr(model, SHARED):
        delattr(model, SHARED)


@torch.no_grad()
def inject_changes(model: nn.Module, changes: Mapping[str, LowRank], method: str) -> AdapterConfig:
    """Put low-rank changes of scaling one into a fresh base as a LoRA, or a DoRA that computes the same.

    Return the config of the adapters: a rank for each layer, and alpha equal to it.
    """
    ranks = {name: len(change.A) for name, change in changes.items()}
    most = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != most}
    config = METHODS[method].config(
        rank=most,
        alpha=float(most),
        target_modules=sorted(changes),
        rank_pattern=others,
        alpha_pattern={name: float(rank) for name, rank in others.items()},
    )
    inject_adapters(model, config)
    for name, layer in adapters(model):
        A, B, _ = changes[name]
        if isinstance(layer, LoRALinear):
            layer.set_factors(A, B)  # a DoRA's magnitude becomes the norms of the sum, so that its gain is one
            continue
        assert isinstance(layer, LoRAEmbedding)
        layer.lora_embedding_A.copy_(A)
        layer.lora_embedding_B.copy_(B)
        if isinstance(layer, DoRAEmbedding):
            layer.lora_magnitude_vector.copy_(layer.weight_norms())
    return config


class WeightedSum(Adapter):
    """y = W x + sum of weight times change, each computed by itself, to compare a combination with.

    Matrices stay on the host until they are multiplied with. Nothing trains.
    """

    def __init__(self, base_layer: nn.Module, changes: Sequence[Change], weights: Sequence[float]):
        super().__init__(base_layer)
        self.parts = list(zip(weights, changes, strict=True))

    def adapt(self, x: Tensor, base_output: Tensor) -> Tensor:
        output = base_output.float()
        for weight, change in self.parts:
            output = output + weight * self._output(x, change)
        return output.to(base_output.dtype)

    def _output(self, x: Tensor, change: Change) -> Tensor:
        is_embedding = isinstance(self.base_layer, nn.Embedding)
        if isinstance(change, Tensor):
            matrix = change.to(x.device)
            return F.embedding(x, matrix.t()) if is_embedding else x.float() @ matrix.t()
        A, B = change.A.to(x.device), change.B.to(x.device)
        inner = F.embedding(x, A.t()) if is_embedding else x.float() @ A.t()
        return change.scaling * (inner @ B.t())

    def delta_weight(self) -> Tensor:
        raise NotImplementedError("a sum that is only compared with is not merged")

    def reset_parameters(self) -> None:
        """Do nothing: there is nothing that trains."""
