"""Rows of the embeddings, and of what else has one for each token, for tokens that are added."""

import torch
from torch import nn
from transformers import PreTrainedModel

from lightning_peft.quantization.linear import CodedWeight


def check_ends_are_dense(model: PreTrainedModel) -> None:
    """Raise ValueError where new tokens would need rows of an embedding or a head that is held in codes."""
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        if isinstance(end, CodedWeight):
            raise ValueError(
                f"model.new_tokens: the checkpoint holds embeddings or head as {end.kind} codes, to which no row can "
                "be added; give the original model"
            )


@torch.no_grad()
def add_embeddings(model: PreTrainedModel, known: int, wanted: int) -> None:
    """Give the tokens from `known` up to `wanted` the mean embedding of those before, in the input and the head.

    So does a table that gives each layer an input of its own, as Gemma 3n has; tokens that were beyond it got row 0.

    Raises ValueError where one of the two is held in codes.
    """
    check_ends_are_dense(model)
    per_layer = _per_layer_table(model)
    first = known if per_layer is None else min(known, per_layer.num_embeddings)
    if wanted > model.config.get_text_config().vocab_size:
        model.resize_token_embeddings(wanted, mean_resizing=False)
    layers: list[nn.Module] = [model.get_input_embeddings(), model.get_output_embeddings()]
    for layer in layers:
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        weight[known:wanted] = weight[:known].float().mean(0).to(weight.dtype)
    if (per_layer := _per_layer_table(model)) is not None:
        weight = per_layer.weight
        weight[first:known] = weight[0]
        weight[known:wanted] = weight[:first].float().mean(0).to(weight.dtype)


def _per_layer_table(model: PreTrainedModel) -> nn.Embedding | None:
    if not getattr(model.config.get_text_config(), "hidden_size_per_layer_input", None):
        return None
    table: nn.Embedding = model.get_per_layer_input_embeddings()  # type: ignore[operator]
    return table
