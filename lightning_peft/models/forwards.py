"""Settings of the forward passes of transformers' models, so that they can be trained and asked here."""

import inspect
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lightning_peft.models.blocks import decoder_of

logger = logging.getLogger(__name__)

WRITTEN_OVER = {"FalconDecoderLayer": "mlp", "Llama4TextMoe": "shared_expert"}
"""Classes that write over the output of a part, and which part, in transformers 5.24."""
USUAL_ARGUMENTS = (
    "use_cache", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
)  # fmt: skip
"""Arguments that losses and answers give a model beside its tokens."""


def name_outputs(model: PreTrainedModel) -> None:
    """Let a model give its outputs by name, and no hidden states or attentions beside, whatever its config.json says.

    Losses and answers are read by those names; to keep every layer's states is the memory that training saves.
    """
    asked = {"return_dict": True, "output_hidden_states": False, "output_attentions": False}
    for config in (model.config, model.config.get_text_config()):
        other = {word: value for word, value in asked.items() if getattr(config, word, value) is not value}
        if other:
            logger.info("%s: %s, other than its config.json", type(model).__name__, other)
        for word, value in other.items():
            setattr(config, word, value)


def rescale_every(model: PreTrainedModel) -> int:
    """Return the blocks after which the published RWKV halves weights for evaluation once more; 0 where it does not."""
    return int(getattr(model, "published_rescale_every", getattr(model.config, "rescale_every", 0)))


def keep_weights_in_evaluation(model: PreTrainedModel) -> None:
    """Stop RWKV from dividing weights in place for evaluation: adapters beside them, and codes, do not follow.

    The division guards fp16 against overflow; by powers of two, it changes no other result.
    """
    if getattr(model.config, "rescale_every", 0):
        logger.info("%s: weights are not divided for evaluation (rescale_every=0)", type(model).__name__)
        setattr(model, "published_rescale_every", model.config.rescale_every)  # noqa: B010 - its type takes modules and tensors
        model.config.rescale_every = 0


def keep_layers_in_training(model: PreTrainedModel) -> None:
    """Stop LayerDrop (Fan et al. 2019, arXiv:1909.11556) from skipping blocks at random while training.

    A step that skips them all has no gradient for any adapter, and ranks that skip different ones wait for each other.
    The configuration, which goes with the merged model, stays as published.
    """
    dropping: list[Any] = [module for module in model.modules() if getattr(module, "layerdrop", 0)]
    if dropping:
        rates = sorted({module.layerdrop for module in dropping})
        logger.info(
            "%s: no layer is skipped in training (layerdrop=%s of its config.json)", type(model).__name__, rates
        )
    for module in dropping:
        module.layerdrop = 0.0


def accept_usual_arguments(model: PreTrainedModel) -> None:
    """Let a forward pass that knows no positions, caches or packed samples, as some remote code, be called as others.

    Arguments that the pass does not know are defaults then: rows of one sample from position 0, without a cache.
    """
    for module in {decoder_of(model), model}:
        unknown = [name for name in USUAL_ARGUMENTS if not takes(module, name)]
        if unknown:
            module.register_forward_pre_hook(partial(_without, unknown), with_kwargs=True)


def takes(module: nn.Module, argument: str) -> bool:
    """Return whether a forward pass knows an argument, by its name or among any others."""
    known = inspect.signature(module.forward).parameters
    return argument in known or any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())


def _without(names: Sequence[str], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {name: value for name, value in kwargs.items() if name not in names}


def keep_outputs(model: nn.Module) -> None:
    """Give those models a copy that add in place to what a part of theirs gave.

    A layer may keep its output for the backward pass, as DoRA does for the gradient of its magnitude.
    """
    for module in list(model.modules()):
        part = getattr(module, WRITTEN_OVER.get(type(module).__name__, ""), None)
        if isinstance(part, nn.Module):
            part.register_forward_hook(lambda module, inputs, output: output.clone())
