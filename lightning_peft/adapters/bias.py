"""Biases of the base trained beside the adapters, as HF PEFT's `bias` has it."""

import logging
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.quantization.weights import is_quantized

logger = logging.getLogger(__name__)


class Bias(Enum):
    """Which biases train: none, all of the model, or those of the adapted layers."""

    none = "none"
    all = "all"
    lora_only = "lora_only"


class MixedLinear(nn.Linear):
    """A linear layer that computes in the dtype of its input, whatever its bias is kept in."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        return F.linear(x, self.weight, self.bias.to(x.dtype))


def train_biases(model: nn.Module, adapted: list[str], which: Bias) -> None:
    """Make the biases trainable, those of linear layers in fp32. ValueError when there are none.

    `adapted` are the names of the wrapped layers, whose biases stand in their `base_layer`.
    """
    if which is Bias.none:
        return
    wrapped = {f"{name}.base_layer" for name in adapted}
    found = [
        module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "bias", None), nn.Parameter) and (which is Bias.all or name in wrapped)
    ]
    if not found:
        whose = "this model" if which is Bias.all else "none of the adapted layers"
        raise ValueError(f"adapter.bias={which.name}: {whose} has a bias; use adapter.bias=none")
    rounded = 0
    for module in found:
        bias = module.bias
        assert isinstance(bias, nn.Parameter)
        bias.requires_grad_(True)
        if bias.dtype == torch.float32:
            continue
        if type(module) is nn.Linear:
            module.__class__ = MixedLinear
        if isinstance(module, MixedLinear) or is_quantized(module):
            bias.data = bias.data.float()
        else:
            rounded += 1
    if rounded:
        logger.warning(
            "adapter.bias=%s: %d biases outside linear layers train in the dtype of the model, which rounds small "
            "steps away; trainer.precision=32-true keeps them", which.name, rounded,
        )  # fmt: skip
