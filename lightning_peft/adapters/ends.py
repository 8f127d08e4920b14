"""The two ends of a model, input embedding and output head, and the one weight that both may share."""

import logging
from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_peft.adapters.base import AdapterConfig
from lightning_peft.adapters.layer_names import PRESETS, matches

logger = logging.getLogger(__name__)

UNTIED = "ends_had_one_weight"
"""The attribute of a model that `untie` has changed."""


def is_tied(model: nn.Module) -> bool:
    """Return whether the output head shares its weight with the input embedding."""
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return False
    embedding, head = ends(model)
    if embedding is None or head is None:
        return False
    # A model on the meta device may not be tied yet.
    return embedding.weight is head.weight or head.weight.is_meta


def text_tower(model: nn.Module) -> str | None:
    """Return the name of the part of a multimodal model that reads text; None for a model of text alone."""
    config = getattr(model, "config", None)
    kinds = ("vision_config", "audio_config", "vit_config")
    if not any(getattr(config, kind, None) is not None for kind in kinds):
        return None
    embedding, _ = ends(model)
    names = [name for name, module in model.named_modules() if module is embedding]
    return names[0].rpartition(".")[0] or None if names else None


def ends(model: nn.Module) -> tuple[Any, Any]:
    """Return the input embedding and output head; None where a model has none."""
    getters: list[Any] = [getattr(model, f"get_{end}_embeddings", lambda: None) for end in ("input", "output")]
    return getters[0](), getters[1]()


def names_an_end(model: nn.Module, config: AdapterConfig) -> bool:
    """Return whether the names given to adapt or to train are those of an embedding or head that share one weight."""
    if not is_tied(model):
        return False
    given = config.target_modules if isinstance(config.target_modules, list) else [config.target_modules]
    patterns = [*map(str, given), *config.trainable_modules]
    names = [name for name, module in model.named_modules() if module in ends(model)]
    return any(matches(pattern, name) for pattern in patterns if pattern not in PRESETS for name in names)


def untie_where_asked(model: nn.Module, config: AdapterConfig) -> None:
    """Untie embedding and head where `untie_embeddings` says so and one of the two is adapted or trained."""
    if config.untie_embeddings and names_an_end(model, config):
        untie(model)


def untie(model: Any) -> None:
    """Give the output head a copy of the weight it shares with the embedding."""
    embedding, head = ends(model)
    setattr(model, UNTIED, True)
    head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    names = {f"{name}.weight" for name, module in model.named_modules() if module is head}
    model.all_tied_weights_keys = {k: v for k, v in model.all_tied_weights_keys.items() if k not in names}
    logger.info("the output head no longer shares the embedding's weight: the adapter changes one of them")


def refuse_tied(model: nn.Module, selected: Iterable[str], option: str) -> None:
    if not is_tied(model):
        return
    for name in selected:
        if model.get_submodule(name) in ends(model):
            raise ValueError(
                f"{option}: {name} shares its weight with the model's other embedding (tie_word_embeddings), so "
                "adapting it would untie them: exclude it, or train both in full with adapter.trainable_modules"
            )
