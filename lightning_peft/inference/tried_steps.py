"""The steps that compute a model: what its cache is and does is tried on a few tokens, not taken for granted.

Some families keep what no cache of transformers holds, and a forward pass may swallow an argument unread.
"""

import logging
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from lightning_peft.adapters.slots import Slots
from lightning_peft.inference.prompt_batches import OWN_ERRORS, is_close
from lightning_peft.inference.static_steps import StaticSteps, why_not_static
from lightning_peft.inference.steps import AnewSteps, PlainSteps, Steps, cache_keyword, can_pad_left
from lightning_peft.quantization.weights import computing_dtype

logger = logging.getLogger(__name__)

TRIED_TOKENS = 8
"""Tokens of a text that is tried."""


def steps_of(model: PreTrainedModel, slots: Slots | None) -> tuple[Steps, bool]:
    """Return the fastest steps that compute a model, and whether these take rows of unlike lengths side by side."""
    if why_not_static(model) is None:
        return StaticSteps(model, slots), True
    text = tried_text(model)
    if (reason := why_without_cache(model, text)) is not None:
        logger.info("%s: each token is computed from all before it, as %s", type(model).__name__, reason)
        return AnewSteps(model, slots), True
    return PlainSteps(model, slots), can_pad_left(model) and are_as_alone(model, [text, text[: TRIED_TOKENS // 2]])


def tried_text(model: PreTrainedModel) -> list[int]:
    """Return a text of a few tokens that a model has."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    return [token % vocabulary for token in range(1, TRIED_TOKENS + 1)]


def why_without_cache(model: PreTrainedModel, text: list[int]) -> str | None:
    """Return why `PlainSteps` do not compute a model; None where they do."""
    if cache_keyword(model) is None:
        return "it takes no cache of transformers"
    try:
        return None if are_as_alone(model, [text]) else "its cache gives other scores"
    except torch.OutOfMemoryError:  # that failure says nothing of the model
        raise
    except OWN_ERRORS as error:
        return f"its cache fails: {' '.join(str(error).split())[:120]}"


@torch.inference_mode()
def are_as_alone(model: PreTrainedModel, texts: Sequence[list[int]]) -> bool:
    """Return whether texts side by side on a cache get the scores that each gets alone without one."""
    steps, routes = PlainSteps(model, None), [-1] * len(texts)
    steps.begin([text[:-2] for text in texts], routes)
    for place in (-2, -1):
        scores = steps.step([text[place] for text in texts], routes)
    expected, dtype = AnewSteps(model, None).begin(texts, routes), computing_dtype(model)
    pairs = zip(scores.float().split(1), expected.float().split(1), strict=True)
    return all(is_close(own, alone, dtype) for own, alone in pairs)
