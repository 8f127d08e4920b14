"""A model once more around the same weights, which stand in memory once."""

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def copy_around_same_tensors(model: PreTrainedModel) -> PreTrainedModel:
    """Return a second tree of modules, around frozen parameters and buffers of the same storage.

    The model must hold all its weights; weights that are tied stay tied. Adapters on one tree are not on the other.
    """
    shared: dict[int, Any] = {}
    for parameter in model.parameters():
        shared[id(parameter)] = nn.Parameter(parameter.data, requires_grad=False)
    for buffer in model.buffers():
        shared[id(buffer)] = buffer
    return copy.deepcopy(model, shared)
