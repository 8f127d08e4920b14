"""The repeated part of a transformer."""

from torch import nn
from transformers import PreTrainedModel


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The part of a causal language model that makes hidden states of tokens, without the head; the model itself where
    it has no such part."""
    base: nn.Module = model.base_model
    if base is not model:
        return base
    # Llama 4's class looks for its decoder under a name that only its multimodal wrapper has.
    embeddings = model.get_input_embeddings()
    return next((child for child in model.children() if embeddings in list(child.modules())[1:]), model)


def block_names(model: PreTrainedModel) -> list[str]:
    """Names of the decoder layers in order, by the class names transformers keeps on one device; [] if it has none."""
    classes = set(model._no_split_modules or ())
    return [name for name, module in model.named_modules() if type(module).__name__ in classes]


def transformer_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers in order, before they are sharded. Raises ValueError if there are none."""
    blocks = [model.get_submodule(name) for name in block_names(model)]
    if not blocks:
        raise ValueError(f"{type(model).__name__} does not say which of its modules are the transformer blocks")
    return blocks
