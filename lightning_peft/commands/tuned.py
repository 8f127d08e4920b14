"""The result of a training: the adapter folder, or a whole model in its place, with lineage and card."""

import logging
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lightning_peft import distributed
from lightning_peft.adapters.base import Adapter
from lightning_peft.adapters.inject import adapters
from lightning_peft.adapters.registry import METHODS
from lightning_peft.checkpoint.atomic import atomic_folder
from lightning_peft.checkpoint.lineage import Lineage, write_lineage
from lightning_peft.checkpoint.merged import merged_state, save_model
from lightning_peft.checkpoint.model_card import write_card
from lightning_peft.checkpoint.peft_check import objection_of_peft
from lightning_peft.checkpoint.peft_format import save_adapter
from lightning_peft.checkpoint.peft_methods import spelling
from lightning_peft.checkpoint.resume import whole_state
from lightning_peft.config import TrainConfig, plain
from lightning_peft.data.layout import PromptLayout
from lightning_peft.inference.load import MODEL_FOLDER
from lightning_peft.inference.own_settings import declared_end_ids
from lightning_peft.models.conversion import fuses_weights
from lightning_peft.models.loading import (
    model_name,
)
from lightning_peft.models.source import copy_companions, name_for_others
from lightning_peft.quantization.experts import expert_stacks
from lightning_peft.quantization.weights import reads_weight
from lightning_peft.training.module import FinetuneModule

logger = logging.getLogger(__name__)


def lineage_of(config: TrainConfig, content: dict[str, str], precision: str) -> Lineage:
    return Lineage(
        base_fingerprint=content["base weights"],
        base_name=model_name(config.model),
        method=config.adapter.method,
        objective=config.objective.name,
        quantization=config.quantization.kind.name,
        precision=precision,
        config=plain(config),
        data_fingerprint=content["training rows"],
    )


def save_tuned(
    module: FinetuneModule, tokenizer: PreTrainedTokenizerFast, folder: Path, lineage: Lineage, layout: PromptLayout
) -> None:
    """Write the adapter folder, or after full fine-tuning a whole model in its place, with the layout of prompts."""
    layout = layout.with_stops(sorted(declared_end_ids(module.model)))
    if not METHODS[module.adapter_config.method].trains_all:
        added = tokenizer if module.model_config.new_tokens else None

        def beside(partial: Path) -> None:
            layout.save(partial)
            write_card(partial)

        base = name_for_others(module.model_config)
        save_adapter(module.model, module.adapter_config, folder, base, lineage, added, beside)
        return
    has_adapters = next(adapters(module.model), None) is not None
    state = merged_state(module.model) if has_adapters else whole_state(module.model)
    if distributed.rank() != 0:
        return
    with atomic_folder(folder.with_name(folder.name.replace("adapter", MODEL_FOLDER))) as partial:
        save_model(module.model, tokenizer, partial, None if has_adapters else module.model.dtype, state)
        copy_companions(module.model_config, partial)
        write_lineage(lineage, partial)
        layout.save(partial)
        write_card(partial)


def is_read_otherwise(model: PreTrainedModel) -> bool:
    """Return whether HF PEFT may rename or refuse layers: of a family with experts, or whose weight is read.

    HF PEFT takes the names of other models as they are, and its import takes seconds.
    """
    if expert_stacks(model) or fuses_weights(model):  # PEFT renames layers of a family that has no expert here
        return True
    parents = [module for module in model.modules() if not isinstance(module, Adapter)]
    return any(reads_weight(parent, leaf) for parent in parents for leaf, _ in parent.named_children())


def check_in_peft(folder: Path, module: FinetuneModule) -> None:
    """Say where HF PEFT would not read the adapter as it is."""
    if not spelling(module.adapter_config.method).in_peft or not is_read_otherwise(module.model):
        return
    if (objection := objection_of_peft(folder, module.model)) is not None:
        logger.warning("%s: %s; lightning-peft reads and merges it", folder, objection)
