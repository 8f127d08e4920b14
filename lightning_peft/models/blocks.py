"""The repeated part of a transformer."""

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # a start that trains nothing does without it


def decoder_of(model: "PreTrainedModel") -> nn.Module:
    """Return the part of a causal language model that makes hidden states of tokens, without the head.

    A model without such a part is returned itself.
    """
    base: nn.Module = model.base_model
    if base is not model:
        return base
    # Llama 4's class looks for its decoder under a name that only its multimodal wrapper has.
    embeddings = model.get_input_embeddings()
    return next((child for child in model.children() if embeddings in list(child.modules())[1:]), model)


def block_names(model: "PreTrainedModel") -> list[str]:
    """Return the decoder layers' names in order, by the class names transformers keeps on one device; [] without any.

    Embeddings are no layer, nor is a part of a layer, as the mixers are that Falcon Mamba names too. A model that names
    no classes has its layers in its largest list of modules of one class.
    """
    classes = set(model._no_split_modules or ())
    embeddings = model.get_input_embeddings()
    found: list[str] = []
    for name, module in model.named_modules():
        is_inside = bool(found) and name.startswith(f"{found[-1]}.")
        if type(module).__name__ in classes and not is_inside and all(m is not embeddings for m in module.modules()):
            found.append(name)
    return found or _largest_list(model)


def _largest_list(model: "PreTrainedModel") -> list[str]:
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(part) for part in module}) == 1
    }
    sizes = {name: sum(parameter.numel() for parameter in module.parameters()) for name, module in lists.items()}
    largest = max(sizes, key=lambda name: sizes[name], default=None)
    return [] if largest is None else [f"{largest}.{number}" for number in range(len(lists[largest]))]


def transformer_blocks(model: "PreTrainedModel") -> list[nn.Module]:
    """Return the decoder layers in order, before they are sharded. Raises ValueError if there are none."""
    blocks = [model.get_submodule(name) for name in block_names(model)]
    if not blocks:
        raise ValueError(f"{type(model).__name__} does not say which of its modules are the transformer blocks")
    return blocks


def check_blocks_can_be_sharded(model: "PreTrainedModel") -> None:
    """Raise ValueError where blocks share weights: a rank holds its slices of each block apart. May be on meta."""
    first: dict[int, str] = {}
    for name in block_names(model):
        for parameter in model.get_submodule(name).parameters():
            if first.setdefault(id(parameter), name) != name:
                raise ValueError(
                    f"strategy=fsdp: {first[id(parameter)]} and {name} of {type(model).__name__} share weights, of "
                    "which no block can have slices of its own; use strategy=ddp"
                )
