"""The configuration that transformers runs a GGUF file's model by, from the file's metadata."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lightning_peft.models.gguf import GGUFFile
from lightning_peft.models.gguf_families import FAMILIES, SIZES, GGUFFamily, model_type_of, score_width
from lightning_peft.models.gguf_fields import check_fields
from lightning_peft.models.gguf_metadata import (
    LONG_FACTORS,
    ROPE_FACTORS,
    SHORT_FACTORS,
    SLIDING,
    is_usual,
    own_pattern,
)

NEEDED = ("block_count", "feed_forward_length", "embedding_length", "attention.head_count")
"""Fields without which nobody can compute the model."""
TOKEN_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
"""Name in transformers: key under tokenizer.ggml."""
BIASES = {
    "attention_bias": "blk.0.attn_q.bias",
    "use_qkv_bias": "blk.0.attn_q.bias",
    "qkv_bias": "blk.0.attn_q.bias",
    "mlp_bias": "blk.0.ffn_gate.bias",
}
"""Options that say whether a layer has a bias: a tensor that is there where they do."""


def gguf_config(file: GGUFFile) -> PreTrainedConfig:
    """Return the model configuration. Raises ValueError for metadata that no configuration of the family has."""
    prefix = file.fields["general.architecture"]
    model_type = model_type_of(file.fields)
    assert model_type is not None
    family = FAMILIES[model_type]
    options = {**SIZES, **family.fields}
    present = {name.removeprefix(f"{prefix}."): value for name, value in file.fields.items()}
    for name in options.keys() & present.keys():
        if isinstance(each := present[name], list):  # one for each block
            if len(set(each)) != 1:
                raise ValueError(
                    f"model.path={file.path}: {prefix}.{name}={each} differs by block, which transformers has no place "
                    f"for in {model_type}"
                )
            present[name] = each[0]
    if lacking := [name for name in NEEDED if name not in present]:
        raise ValueError(f"model.path={file.path}: has no {prefix}.{lacking[0]}; fetch the file again")
    values = {**family.needs, **{ours: present[theirs] for theirs, ours in options.items() if theirs in present}}
    values.setdefault("vocab_size", file.tensors["token_embd.weight"].shape[0])
    values["head_dim"] = present.get("attention.key_length") or values["hidden_size"] // values["num_attention_heads"]
    values |= {
        option: tensor in file.tensors
        for option, tensor in BIASES.items()
        if hasattr(CONFIG_MAPPING[model_type], option)
    }
    values.setdefault("num_key_value_heads", values["num_attention_heads"])
    if not values.get("sliding_window", True):
        del values["sliding_window"]  # no layer has one
    if family.period is not None:
        values |= window_options(present, family, values["num_hidden_layers"])
    if model_type == "phi3":
        values["original_max_position_embeddings"] = present.get(
            "rope.scaling.original_context_length", values.get("max_position_embeddings")
        )
    values["rope_parameters"] = rope_parameters(file, family, values)
    values |= {f"{name}_id": file.fields.get(f"tokenizer.ggml.{key}") for name, key in TOKEN_KEYS.items()}
    values["tie_word_embeddings"] = "output.weight" not in file.tensors
    config: Any = AutoConfig.for_model(model_type, **values)
    if hasattr(config, "query_pre_attn_scalar"):
        config.query_pre_attn_scalar = score_width(family.architecture, config)
    if model_type == "cohere":
        config.use_qk_norm = "blk.0.attn_q_norm.weight" in file.tensors
    check_fields(file, config)
    return config


def window_options(present: Mapping[str, Any], family: GGUFFamily, layers: int) -> dict[str, Any]:
    """Return the options of a family some of whose layers have a window."""
    window = present.get("attention.sliding_window")
    slides = present.get("attention.sliding_window_pattern") or own_pattern(family, layers)
    if not window and not family.always_slides:
        slides = [False] * layers
    kinds = {"layer_types": [SLIDING if each else "full_attention" for each in slides]}
    return {**kinds, "sliding_window": window} if window else kinds


def _rope_field(file: GGUFFile, key: str, default: Any = None) -> Any:
    return file.fields.get(f"{file.fields.get('general.architecture')}.rope.{key}", default)


def rope_scaling(file: GGUFFile) -> tuple[str, float]:
    """Return the way positions are scaled and its factor, ("none", 1.0) where they are not, as llama.cpp reads them.

    A factor without a type is that of linear scaling.
    """
    factor = float(_rope_field(file, "scaling.factor", _rope_field(file, "scale_linear", 1.0)))
    kind = str(_rope_field(file, "scaling.type", "linear"))
    is_off = kind == "none" or (kind in ("linear", "yarn") and factor in (0.0, 1.0))
    return ("none", 1.0) if is_off else (kind, factor)


def rope_parameters(file: GGUFFile, family: GGUFFamily, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return how positions are encoded, in transformers' words; `values` are the other options."""
    width = values["head_dim"]
    turned = _rope_field(file, "dimension_count", width) if family.turns_partly else width
    rope = scaled_positions(file, turned)
    if family.turns_partly:
        rope["partial_rotary_factor"] = turned / width
    if not family.has_bases_by_kind:
        return rope
    local = {"rope_type": "default", "rope_theta": _rope_field(file, "freq_base_swa", default_base(file, family))}
    return {"full_attention": rope, SLIDING: local}


def default_base(file: GGUFFile, family: GGUFFamily) -> float:
    """Return the pace in layers with a window where a file does not say it."""
    return 10000.0 if family.architecture == "gemma3" else float(_rope_field(file, "freq_base", 10000.0))


def scaled_positions(file: GGUFFile, turned: int) -> dict[str, Any]:
    """Return how positions are encoded in the layers that see everything, for heads that turn in `turned` numbers."""
    theta = _rope_field(file, "freq_base", 10000.0)
    scaling, factor = rope_scaling(file)
    context = file.fields.get(f"{file.fields['general.architecture']}.context_length")
    if ROPE_FACTORS in file.tensors:
        factors = file.read(ROPE_FACTORS, torch.float32)
        if factors.shape != (turned // 2,):
            raise ValueError(
                f"model.path={file.path}: {ROPE_FACTORS} has {factors.numel()} factors, and heads of {turned} need "
                f"{turned // 2}"
            )
        return llama3_parameters(factors, theta, turned) or {
            "rope_type": "longrope",
            "rope_theta": theta,
            "short_factor": factors.tolist(),
            "long_factor": factors.tolist(),
            "attention_factor": 1.0,
            "original_max_position_embeddings": context,
        }
    if LONG_FACTORS in file.tensors:
        return {
            "rope_type": "longrope",
            "rope_theta": theta,
            "short_factor": file.read(SHORT_FACTORS, torch.float32).tolist(),
            "long_factor": file.read(LONG_FACTORS, torch.float32).tolist(),
            "attention_factor": _rope_field(file, "scaling.attn_factor", 1.0),
            "original_max_position_embeddings": _rope_field(file, "scaling.original_context_length", context),
        }
    if scaling == "none":
        return {"rope_type": "default", "rope_theta": theta}
    parameters = {"rope_type": scaling, "rope_theta": theta, "factor": factor}
    if scaling == "yarn":
        for key in ("beta_fast", "beta_slow"):
            if (beta := _rope_field(file, f"scaling.yarn_{key}")) is not None:
                parameters[key] = beta
        parameters["original_max_position_embeddings"] = _rope_field(file, "scaling.original_context_length", context)
        attention = _rope_field(file, "scaling.yarn_attn_factor")
        if attention is not None and is_usual(attention, factor):
            parameters["attention_factor"] = attention
        if file.fields["general.architecture"] == "gpt-oss":
            parameters["truncate"] = False  # which no field says
    return parameters


def llama3_parameters(factors: Tensor, theta: float, head_dim: int) -> dict[str, Any] | None:
    """Return Llama 3.1's scaling, by the divisors (head_dim / 2,) of the frequencies llama.cpp stores; None if other.

    Its context is a power of two, its two bounds are 1 and 4 in every model published.
    """
    parameters: dict[str, Any] = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    plain = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    for power in range(5, 18):
        parameters["original_max_position_embeddings"] = 2**power
        config = AutoConfig.for_model(
            "llama", rope_parameters=dict(parameters), head_dim=head_dim, max_position_embeddings=2**18
        )
        frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        if torch.allclose(plain / factors, frequencies, rtol=1e-4):
            return parameters
    return None
