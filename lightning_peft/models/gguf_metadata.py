"""The metadata of a GGUF file that say how a model is computed, from its configuration."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lightning_peft.models.gguf_families import (
    FAMILIES,
    SIZES,
    GGUFFamily,
    GGUFModelError,
    check_computed,
    check_family,
    head_width,
    refused,
)

ROPE_FACTORS = "rope_freqs.weight"
"""Divisors of the rotary frequencies: how llama.cpp stores Llama 3.1's scaling."""
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
"""Divisors for texts beyond the original context and for others: Phi-3's scaling."""
BOUNDS = ("low_freq_factor", "high_freq_factor")
SLIDING = "sliding_attention"


def check_written(config: PreTrainedConfig, tied: bool, has_metadata: bool) -> None:
    """Raise GGUFModelError for a model that no file says in full.

    `tied` is whether its head is the embedding, `has_metadata` whether its base's own file says the fields.
    """
    check_family(str(config.model_type))
    check_computed(config, tied)
    if not has_metadata:
        fields_of(config)


def fields_of(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields of a model, without the architecture that their names begin with.

    A float is stored in 32 bits, an int unsigned in 32. Raises GGUFModelError for positions that no field can say.
    """
    family = FAMILIES[config.model_type]
    held = {key: getattr(config, option, None) for key, option in {**SIZES, **family.fields}.items()}
    fields = {key: value for key, value in held.items() if value is not None}
    width = head_width(config)
    fields |= {"attention.key_length": width, "attention.value_length": width}
    for key in fields.keys() & FLOATS:
        fields[key] = float(fields[key])
    return fields | dict(family.constants) | windows(config, family) | positions(config, family)


FLOATS = {
    "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "attention.scale", "embedding_scale",
    "residual_scale", "logit_scale", "final_logit_softcapping", "attn_logit_softcapping", "attention.clamp_kqv",
}  # fmt: skip
"""Fields that are floats whatever number a configuration has."""


def own_pattern(family: GGUFFamily, layers: int) -> list[bool]:
    """Return which layers have a window where a file does not say so."""
    assert family.period is not None
    return [(layer + 1) % family.period != 0 for layer in range(layers)]


def windows(config: Any, family: GGUFFamily) -> dict[str, Any]:
    """Return what is said of windows beside their width."""
    if config.model_type == "phi3":
        return {"attention.sliding_window": config.sliding_window or 0}
    if family.period is None:
        return {}
    slides = [kind == SLIDING for kind in config.layer_types]
    if not any(slides):
        if family.always_slides:
            raise refused(config, "has a window, and no layer of this model has one")
        return {"attention.sliding_window": 0}
    is_own = slides == own_pattern(family, len(slides))
    return {} if is_own and config.model_type != "olmo3" else {"attention.sliding_window_pattern": slides}


def positions(config: Any, family: GGUFFamily) -> dict[str, Any]:
    """Return how positions are encoded."""
    rope, local = ropes(config)
    width = head_width(config)
    turned = int(width * rope.get("partial_rotary_factor", 1.0)) if family.turns_partly else width
    fields: dict[str, Any] = {"rope.dimension_count": turned, "rope.freq_base": float(rope.get("rope_theta", 10000.0))}
    if local is not None:
        if local.get("rope_type", "default") != "default":
            raise refused(config, f"has no positions scaled by {local['rope_type']} in layers with a window")
        if local["rope_theta"] != rope["rope_theta"] and family.architecture != "gemma3":
            raise refused(
                config, "turns positions at one pace in all layers, and this model has a rope_theta for each kind"
            )
        fields["rope.freq_base_swa"] = float(local["rope_theta"])
    if config.model_type == "phi3":
        fields["rope.scaling.original_context_length"] = original_context(config, rope)
    kind = rope.get("rope_type", "default")
    if kind == "longrope" and config.model_type == "phi3":
        _, scaling = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))
        return {**fields, "rope.scaling.attn_factor": float(scaling)}
    is_scaled = "rope.scaling.type" not in family.constants and kind in ("linear", "yarn")
    if is_scaled:
        fields |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
        return fields | (yarn(config, rope) if kind == "yarn" else {})
    if kind != "default" and not (kind == "llama3" and family.has_frequencies):
        raise GGUFModelError(
            f"format=gguf: positions of {config.model_type} scaled by {kind} are not written here; use merge"
        )
    return fields


def ropes(config: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return how positions are encoded, and in layers with a window where that is said apart."""
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    if "full_attention" not in rope:
        return rope, None
    return rope["full_attention"], rope[SLIDING]


def original_context(config: Any, rope: Mapping[str, Any]) -> int:
    return int(rope.get("original_max_position_embeddings") or config.original_max_position_embeddings)


def yarn(config: PreTrainedConfig, rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return what YaRN goes by. Raises GGUFModelError for what llama.cpp computes in its own way."""
    own = {key: rope[key] for key in ("mscale", "mscale_all_dim") if rope.get(key) is not None}
    attention = rope.get("attention_factor")
    if attention is not None and not is_usual(attention, rope["factor"]):
        own["attention_factor"] = attention
    if rope.get("truncate") is False and config.model_type != "gpt_oss":
        own["truncate"] = False
    if own:
        shown = ", ".join(f"{key}={value}" for key, value in own.items())
        raise GGUFModelError(f"format=gguf: positions scaled by yarn with {shown} are not written here; use merge")
    fields: dict[str, Any] = {"rope.scaling.original_context_length": int(rope["original_max_position_embeddings"])}
    for key, stored in {"beta_fast": "beta_fast", "beta_slow": "beta_slow", "attention_factor": "attn_factor"}.items():
        if rope.get(key) is not None:
            fields[f"rope.scaling.yarn_{stored}"] = float(rope[key])
    return fields


def is_usual(attention_factor: float, factor: float) -> bool:
    """Return whether YaRN scales its scores as llama.cpp does, whatever the file says."""
    return math.isclose(attention_factor, 0.1 * math.log(factor) + 1 if factor > 1 else 1.0, rel_tol=1e-6)


def position_tensors(config: PreTrainedConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that say how positions are scaled: Llama 3's frequencies, and Phi-3's two sets."""
    rope, _ = ropes(config)
    kind = rope.get("rope_type")
    if kind == "llama3":
        yield ROPE_FACTORS, llama_3_factors(rope, head_width(config))
    if kind == "longrope":
        yield LONG_FACTORS, torch.tensor(rope["long_factor"], dtype=torch.float32)
        yield SHORT_FACTORS, torch.tensor(rope["short_factor"], dtype=torch.float32)


def llama_3_factors(rope: Mapping[str, Any], width: int) -> Tensor:
    """Return what Llama 3.1 divides its frequencies by: (width / 2,), fp32.

    Short waves are left as they are, long ones slowed by `factor`, and those between by a mean of both.
    """
    context, low, high = (float(rope[key]) for key in ("original_max_position_embeddings", *BOUNDS))
    waves = 2 * math.pi * float(rope["rope_theta"]) ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    share = (context / waves - low) / (high - low)
    between = 1 / ((1 - share) / rope["factor"] + share)
    slowed = torch.where(waves > context / low, float(rope["factor"]), between)
    return torch.where(waves < context / high, 1.0, slowed)
