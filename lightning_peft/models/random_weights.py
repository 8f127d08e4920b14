"""Weights that no file holds: a model of a real shape to measure speed and memory with."""

import zlib

import torch
from torch import Tensor
from transformers import PreTrainedModel

STANDARD_DEVIATION = 0.02
"""Standard deviation of every matrix: transformers initialises most families with it."""


class RandomWeights:
    """A `WeightSource` that draws each tensor on `device` when it is read, so that no more than one is dense at a time.

    Matrices are normal with the name as their seed, norms one, biases zero.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device):
        self._device = device
        tied = getattr(model, "all_tied_weights_keys", {})
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if name not in tied}

    def names(self) -> list[str]:
        return list(self._shapes)

    def read(self, name: str, dtype: torch.dtype | None) -> Tensor:
        shape = self._shapes[name]
        if len(shape) < 2:
            return torch.full(shape, float(not name.endswith("bias")), dtype=dtype, device=self._device)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        tensor = torch.empty(shape, dtype=dtype, device=self._device)
        return tensor.normal_(0, STANDARD_DEVIATION, generator=generator)
