"""Biases of the base trained beside the adapters, as HF PEFT's `bias` has it."""

import logging
from collections.abc import Container, Iterable
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.quantization.weights import is_quantized

logger = logging.getLogger(__name__)


class Bias(Enum):
    """The biases that train: none, all of the model, or those of the adapted layers."""

    none = "none"
    all = "all"
    lora_only = "lora_only"


class MixedLinear(nn.Linear):
    """A linear layer that computes in the dtype of its input, whatever its bias is kept in."""

    @classmethod
    def of(cls, layer: nn.Linear) -> "MixedLinear":
        """Return one with the weight and bias of the layer, not copied."""
        mixed = cls(layer.in_features, layer.out_features, device="meta")
        mixed.weight, mixed.bias = layer.weight, layer.bias
        return mixed.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        return F.linear(x, self.weight, self.bias.to(x.dtype))


def layers_with_bias(model: nn.Module, adapted: Container[str], which: Bias) -> list[str]:
    """Return the names of the layers whose biases are chosen, `adapted` being the wrapped ones; ValueError if none."""
    if which is Bias.none:
        return []
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(getattr(module, "bias", None), nn.Parameter) and (which is Bias.all or name in adapted)
    ]
    if not found:
        whose = "no layer of this model" if which is Bias.all else "none of the adapted layers"
        raise ValueError(f"adapter.bias={which.name}: {whose} has a bias; use adapter.bias=none")
    return found


def train_biases(model: nn.Module, names: Iterable[str]) -> int:
    """Make the biases of these layers trainable, linear ones' in fp32; return how many train in a smaller dtype."""
    rounded = 0
    for name in names:
        layer = model.get_submodule(name)
        bias = layer.bias
        assert isinstance(bias, nn.Parameter)
        bias.requires_grad_(True)
        if bias.dtype == torch.float32:
            continue
        if type(layer) is nn.Linear:
            layer = MixedLinear.of(layer)
            model.set_submodule(name, layer)
        if isinstance(layer, MixedLinear) or is_quantized(layer):
            bias.data = bias.data.float()
        else:
            rounded += 1
    return rounded


def warn_of_rounding(which: Bias, rounded: int) -> None:
    if rounded:
        logger.warning(
            "adapter.bias=%s: %d biases outside linear layers train in the dtype of the model, which rounds small "
            "steps away; trainer.precision=32-true keeps them", which.name, rounded,
        )  # fmt: skip
