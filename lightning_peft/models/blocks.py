"""The repeated part of a transformer."""

from torch import nn
from transformers import PreTrainedModel


def transformer_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers in order, by the class names transformers keeps on one device. Raises ValueError if none."""
    names = set(model._no_split_modules or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        raise ValueError(f"{type(model).__name__} does not say which of its modules are the transformer blocks")
    return blocks
