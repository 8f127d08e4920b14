"""HF PEFT's words: the spelling of each method, and the features of HF that we do not have."""

from dataclasses import fields
from typing import Any

from lightning_peft.adapters.initialization import INITS
from lightning_peft.adapters.inject import SHARED
from lightning_peft.adapters.method import PeftSpelling
from lightning_peft.adapters.registry import METHODS

READ_OFF_THE_FILE = (
    "method", "target_modules", "exclude_modules", "layers", "trainable_modules", "init_from", "untie_embeddings",
    "experts", "experts_share_A",
)  # fmt: skip
"""Fields of our config that no spelling has: the tensors say which layers were adapted."""


def spellings() -> dict[str, PeftSpelling]:
    """Return how folders of every method are read, by name; the first that fits is the method."""
    found = {name: spelling(name) for name, method in METHODS.items() if method.layers}
    return {name: row for name, row in found.items() if row.is_read}


def spelling(name: str) -> PeftSpelling:
    """Return how a method is written: as its row says, else by the names of its own options."""
    method = METHODS[name]
    if method.peft is not None:
        return method.peft
    options = {field.name: field.name for field in fields(method.config) if field.name not in READ_OFF_THE_FILE}
    tensors = tuple(end for end in method.trained if not end.startswith(f"{SHARED}."))
    return PeftSpelling(name.upper(), tensors, options, rank_word=None, in_peft=False)


SWITCHED_OFF: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "init_weights": (None, True, False, "gaussian"),
    "kasa_config": (None,),
    "layer_replication": (None, []),
    "megatron_config": (None,),
    "monteclora_config": (None,),
    "use_bdlora": (None, False),
    "use_qalora": (None, False),
}
"""HF features that we do not have, with the values at which they are off."""

# The tensors tell which layers were adapted at which rank; the other words say how training began or was run.
WITHOUT_EFFECT = """
    target_modules exclude_modules layers_to_transform layers_pattern rank_pattern auto_mapping base_model_name_or_path
    corda_config ensure_weight_tying eva_config fan_in_fan_out feedforward_modules inference_mode init_ia3_weights
    loftq_config lora_ga_config megatron_core mini_r peft_version qalora_group_size r revision runtime_config task_type
    velora_config
""".split()
READ_HERE = (
    "peft_type", "alpha_pattern", "bias", "init_lora_weights", "lora_bias", "modules_to_save", "target_parameters",
    "trainable_token_indices",
)  # fmt: skip

KEEPS_BASE = ("true", "false", "gaussian", "orthogonal", "eva", "mica")
"""Values of init_lora_weights that leave the base weights alone."""
REWRITES_BASE = tuple(name for name, init in INITS.items() if init.in_peft)
"""Values that take the start of A and B out of the base, in a way we repeat exactly; they are options of ours too."""
