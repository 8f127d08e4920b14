"""Whether samples are packed for a model: `data.packing` made concrete."""

import logging

from transformers import PreTrainedModel

from lightning_peft.data.config import DataConfig
from lightning_peft.models.attention import supports_packing

logger = logging.getLogger(__name__)


def packing_of(config: DataConfig, model: PreTrainedModel) -> bool:
    """Whether rows hold several samples; a model on the meta device will do.

    `auto` packs where samples stay apart, and says so where they would not. ValueError for true where they would not.
    """
    if supports_packing(model):
        return bool(config.packing)
    if config.packing == "auto":
        logger.info(
            "data.packing=false: packed samples would see each other in %s, so rows are padded", type(model).__name__
        )
        return False
    if config.packing:
        raise ValueError(
            f"data.packing=true: packed samples would see each other in {type(model).__name__}; use data.packing=auto"
        )
    return False
