"""Tokens that a model has embeddings for."""

from collections.abc import Iterable

from transformers import PreTrainedModel


def check_token_ids(model: PreTrainedModel, prompts: Iterable[list[int]]) -> None:
    """Raise ValueError for a prompt with a token that the model has no embedding for.

    A tokenizer may have more tokens than its model; on a GPU such a token ends the process.
    """
    count = getattr(model.get_input_embeddings(), "num_embeddings", None)
    highest = max((max(prompt, default=0) for prompt in prompts), default=0)
    if isinstance(count, int) and highest >= count:
        raise ValueError(
            f"a prompt has a token with the id {highest}, and the model has embeddings for {count}: leave it out, or "
            "take the tokenizer that belongs to the model"
        )
