"""The comparison of a GGUF file's metadata with the configuration that was made of them.

A field that nobody reads is a model computed otherwise: a softcap, a scale, a window, heads that rotate in part.
"""

import math
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from lightning_peft.models.gguf import GGUFFile
from lightning_peft.models.gguf_families import BLOCKS_OF_27B, FAMILIES, score_width

SAME_AS: dict[str, tuple[str, ...]] = {
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads", "num_kv_heads"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon", "layer_norm_eps"),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "attention.key_length": ("head_dim", "global_head_dim"),
    "attention.value_length": ("v_head_dim", "head_dim", "global_head_dim"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_count": ("num_experts", "num_local_experts", "n_routed_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size", "intermediate_size"),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_weights_norm": ("norm_topk_prob",),
    "expert_weights_scale": ("routed_scaling_factor",),
    "leading_dense_block_count": ("first_k_dense_replace",),
    "shortconv.l_cache": ("conv_L_cache",),
    "attention.clamp_kqv": ("clip_qkv",),
    "attention.scale": ("attention_multiplier",),
    "embedding_scale": ("embedding_multiplier",),
    "residual_scale": ("residual_multiplier",),
    "logit_scale": ("logit_scale", "logits_scaling"),
}
"""Field: the options of a configuration that may hold it; one of them must."""
OF_SIZES = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "ssm.conv_kernel",
    "ssm.inner_size", "ssm.state_size", "ssm.time_step_rank",
)  # fmt: skip
"""Fields that the shapes of the weights bear out, and the context."""
WITHOUT_EFFECT = ("tensor_data_layout", "pooling_type", "rope.scaling.finetuned", "use_parallel_residual")
OFF = {"attention.scale": (0.0, 1.0), "logit_scale": (0.0, 1.0), "residual_scale": (0.0, 1.0),
       "embedding_scale": (0.0, 1.0), "rope.scaling.attn_factor": (0.0, 1.0),
       "rope.scaling.yarn_attn_factor": (0.0, 1.0), "rope.scaling.yarn_ext_factor": (-1.0, 1.0)}  # fmt: skip
"""Values at which a field changes nothing; of any other field it is 0 or nothing."""
OF_ROPE = (
    "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear", "rope.scaling.original_context_length",
    "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
)  # fmt: skip
"""Fields that `rope_parameters` makes its own of."""


def check_fields(file: GGUFFile, config: PreTrainedConfig) -> None:
    """Raise ValueError for a field of the model that the configuration does not hold."""
    text: Any = config.get_text_config()
    _check_scores(file, text)
    prefix = f"{file.fields['general.architecture']}."
    for name, value in file.fields.items():
        field = name.removeprefix(prefix)
        if field == name or field in (*OF_SIZES, *WITHOUT_EFFECT, *OF_ROPE):
            continue
        expected = [True] if field == "attention.causal" else _expected(field, text)
        if not expected and _is_off(field, value):
            continue
        if field == "attention.head_count_kv" and isinstance(value, Sequence):
            value = [heads for heads in value if heads]  # layers without attention have none
        if field == "attention.sliding_window" and not expected and _sees_all(value, text):
            continue
        if expected is None or not any(_is_same(value, one) for one in expected):
            known = f"is {_shown(expected)} for transformers" if expected else "is not read"
            raise ValueError(
                f"model.path={file.path}: {name}={_shown(value)} {known}; use the model's safetensors files"
            )


def _check_scores(file: GGUFFile, text: Any) -> None:
    """Raise ValueError where Gemma's scores are divided by another number than llama.cpp's, which no field says."""
    scalar = getattr(text, "query_pre_attn_scalar", None)
    architecture = str(file.fields["general.architecture"])
    if scalar is None or architecture not in BLOCKS_OF_27B:
        return
    right = score_width(architecture, text)
    if scalar != right:
        raise ValueError(
            f"model.path={file.path}: its scores are divided by the root of {right}, and of {scalar} for transformers; "
            "use the model's safetensors files"
        )


def _expected(field: str, text: Any) -> list[Any] | None:
    """Return what a field may be for this configuration to be right; None for one that is not known."""
    rope = getattr(text, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    if field in ("rope.freq_base", "rope.freq_base_swa"):
        return [part["rope_theta"] for part in parts if "rope_theta" in part]
    widths = _head_widths(text)
    if field == "rope.dimension_count":
        share = getattr(text, "partial_rotary_factor", None) or next(
            (part["partial_rotary_factor"] for part in parts if part.get("partial_rotary_factor")), 1.0
        )
        return [int(width * share) for width in widths]
    if field in ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"):
        return [part["attention_factor"] for part in parts if part.get("attention_factor")]
    if text.model_type in FAMILIES and field in (constants := FAMILIES[text.model_type].constants):
        return [constants[field]]
    if field == "attention.sliding_window_pattern":
        return [[kind == "sliding_attention" for kind in getattr(text, "layer_types", None) or []]]
    if field not in SAME_AS:
        return None
    kinds = getattr(text, "layer_types", None)
    if field == "attention.sliding_window" and kinds and "sliding_attention" not in kinds:
        return []
    found = [getattr(text, name) for name in SAME_AS[field] if getattr(text, name, None) is not None]
    if field == "attention.head_count_kv":
        return found or [text.num_attention_heads]
    return found or (widths if field in ("attention.key_length", "attention.value_length") else [])


def _head_widths(text: Any) -> list[int]:
    sizes = [getattr(text, name, None) for name in ("head_dim", "global_head_dim")]
    heads = getattr(text, "num_attention_heads", None)
    return [size for size in sizes if size] or ([text.hidden_size // heads] if heads else [])


def _sees_all(window: Any, text: Any) -> bool:
    """Return whether a window is no shorter than the context."""
    context = getattr(text, "max_position_embeddings", None)
    return isinstance(window, int) and context is not None and window >= context


def _is_off(field: str, value: Any) -> bool:
    return value in OFF.get(field, ()) or not value


def _is_same(value: Any, expected: Any) -> bool:
    if isinstance(value, Sequence) and not isinstance(value, str):
        each = expected if isinstance(expected, Sequence) else [expected] * len(value)
        return len(each) == len(value) and all(map(_is_same, value, each))
    if isinstance(value, float) or isinstance(expected, float):
        return math.isclose(value, expected, rel_tol=1e-5)
    return bool(value == expected)


def _shown(value: Any) -> str:
    """Return a value, or those that it may be, in a few characters."""
    if isinstance(value, list):
        value = " or ".join(dict.fromkeys(map(_shown, value)))
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
