"""Whether samples are packed for a model: `data.packing` made concrete."""

import logging

from transformers import PreTrainedModel

from lightning_peft.data.config import DataConfig
from lightning_peft.models.attention import supports_packing
from lightning_peft.models.rope import follows_length

logger = logging.getLogger(__name__)


def packing_of(config: DataConfig, model: PreTrainedModel) -> bool:
    """Whether rows hold several samples; a model on the meta device will do.

    `auto` packs where samples stay apart, and says so where they would not. ValueError for true where they would not.
    """
    if follows_length(model.config, config.max_length):
        problem = "the longest of packed samples would set the rotary frequencies of all"
    elif not supports_packing(model):
        problem = f"packed samples would see each other in {type(model).__name__}"
    else:
        return bool(config.packing)
    if config.packing == "auto":
        logger.info("data.packing=false: %s, so rows are padded", problem)
        return False
    if config.packing:
        raise ValueError(f"data.packing=true: {problem}; use data.packing=auto")
    return False
