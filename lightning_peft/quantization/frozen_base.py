"""The frozen layers, dense or coded, that the fused kernels can run by themselves."""

import torch
from torch import Tensor, nn

from lightning_peft.kernels.frozen_linear import DENSE, Base
from lightning_peft.quantization.linear import QuantizedLinear


def frozen_base(layer: nn.Module, x: Tensor) -> Base | None:
    """Describe the layer as the base of a fused kernel for x (..., in_features).

    The result is None where the layer trains, has hooks or is unknown to the kernels: then it has to be called.
    """
    if layer._forward_pre_hooks or layer._forward_hooks or layer._backward_pre_hooks or layer._backward_hooks:
        return None
    if "forward" in layer.__dict__:  # libraries that move weights to and fro put one there
        return None
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    if type(layer) is QuantizedLinear:
        return Base(dtype, layer.kind, layer.block_size, (*layer.codes, layer.bias))
    if type(layer) is not nn.Linear or layer.weight.requires_grad or (layer.weight.dtype != dtype and not autocast):
        return None
    return Base(dtype, DENSE, 0, (layer.weight, layer.bias))
