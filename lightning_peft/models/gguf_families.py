"""The families that GGUF files are written and read of: llama.cpp's name of each, and what it computes without a word.

A file holds sizes and a few options; the rest of a family's configuration is code in llama.cpp. `needs` says what that
code computes, so that another model is refused before it is written, and a file is read as llama.cpp runs it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig


class GGUFModelError(ValueError):
    """A model that cannot be written as a GGUF file here."""


@dataclass(frozen=True)
class GGUFFamily:
    """One family of transformers in llama.cpp's words."""

    architecture: str
    fields: Mapping[str, str]
    """Fields of a file beyond `SIZES`: the option of the configuration that each holds."""
    needs: Mapping[str, Any]
    """Options of the configuration: the one value that llama.cpp computes with."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Fields that are the same for all models."""
    optional: tuple[str, ...] = ()
    """Options that may be null, as llama.cpp then does without."""
    is_permuted: bool = False
    """True where the rows of q and k lie in rotary pairs, where transformers has the two halves apart."""
    adds_one: bool = False
    """True where norms are stored with the 1 that transformers adds to them."""
    period: int | None = None
    """Layers with a window, up to every so many-th, where the file does not say which; None for a family without."""
    always_slides: bool = False
    """True where llama.cpp runs no model of the family without a window."""
    has_bases_by_kind: bool = False
    """True where positions turn at another pace in layers with a window."""
    turns_partly: bool = False
    """True where a part of each head may stay without a position."""
    head: str = "any"
    """"tied" where the head is always the embedding, "own" where the file has a tensor for it even so."""
    has_any_width: bool = False
    """True where heads may be of another width than hidden_size / num_attention_heads."""
    has_frequencies: bool = False
    """True where the divisors of Llama 3's frequencies are read."""


SIZES = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "vocab_size": "vocab_size",
}
"""Fields of every file: the option that each holds."""

RMS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
NORM = {"attention.layer_norm_epsilon": "layer_norm_eps"}
WINDOW = {"attention.sliding_window": "sliding_window"}
SOFTCAP = {"final_logit_softcapping": "final_logit_softcapping"}
USED = {"expert_used_count": "num_experts_per_tok"}
MULTIPLIERS = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
UNSCALED = {"rope.scaling.type": "none"}
SILU = {"hidden_act": "silu"}
PLAIN = {"hidden_act": "silu", "attention_bias": False}
TANH = "gelu_pytorch_tanh"
GEMMA = {"attention_bias": False, "use_bidirectional_attention": False}
LLAMA: dict[str, Any] = {"is_permuted": True, "has_any_width": True, "has_frequencies": True}
GEMMAS: dict[str, Any] = {"adds_one": True, "has_any_width": True}

FAMILIES = {
    "llama": GGUFFamily("llama", RMS, SILU, **LLAMA),
    "mistral": GGUFFamily("llama", RMS, SILU, **LLAMA),
    "mixtral": GGUFFamily("llama", {**RMS, "expert_count": "num_local_experts", **USED}, SILU, **LLAMA),
    "qwen2": GGUFFamily("qwen2", RMS, SILU),
    "qwen3": GGUFFamily("qwen3", RMS, PLAIN, has_any_width=True),
    "qwen3_moe": GGUFFamily(
        "qwen3moe",
        {**RMS, "expert_count": "num_experts", **USED, "expert_feed_forward_length": "moe_intermediate_size"},
        {**PLAIN, "norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 1},
        has_any_width=True,
    ),
    "gemma": GGUFFamily("gemma", RMS, {**GEMMA, "hidden_act": TANH}, head="tied", **GEMMAS),
    "gemma2": GGUFFamily(
        "gemma2",
        {**RMS, **WINDOW, **SOFTCAP, "attn_logit_softcapping": "attn_logit_softcapping"},
        {**GEMMA, "hidden_activation": TANH},
        period=2, always_slides=True, head="tied", **GEMMAS,
    ),
    "gemma3_text": GGUFFamily(
        "gemma3",
        {**RMS, **WINDOW, **SOFTCAP},
        {**GEMMA, "hidden_activation": TANH, "attn_logit_softcapping": None},
        optional=("final_logit_softcapping", "sliding_window"), period=6, has_bases_by_kind=True, **GEMMAS,
    ),
    "phi3": GGUFFamily("phi3", {**RMS, **WINDOW}, SILU, optional=("sliding_window",), turns_partly=True),
    "smollm3": GGUFFamily("smollm3", RMS, {**PLAIN, "mlp_bias": False}, is_permuted=True, has_any_width=True),
    "granite": GGUFFamily("granite", {**RMS, **MULTIPLIERS}, SILU, is_permuted=True),
    "olmo": GGUFFamily(
        "olmo", {"attention.clamp_kqv": "clip_qkv"}, PLAIN, {"attention.layer_norm_epsilon": 1e-5},
        optional=("clip_qkv",), is_permuted=True,
    ),
    "olmo2": GGUFFamily("olmo2", RMS, PLAIN, head="own"),
    "olmo3": GGUFFamily(
        "olmo2", {**RMS, **WINDOW}, PLAIN,
        optional=("sliding_window",), period=4, has_bases_by_kind=True, head="own",
    ),
    "cohere": GGUFFamily(
        "command-r", {**NORM, "logit_scale": "logit_scale"}, PLAIN, UNSCALED, head="tied"
    ),
    "cohere2": GGUFFamily(
        "cohere2",
        {**NORM, **WINDOW, "logit_scale": "logit_scale"},
        PLAIN,
        UNSCALED,
        period=4, always_slides=True, head="tied",
    ),
    "glm4": GGUFFamily("glm4", RMS, SILU, turns_partly=True, has_any_width=True),
    "gpt_oss": GGUFFamily(
        "gpt-oss",
        {
            **RMS, **WINDOW, "expert_count": "num_local_experts", **USED,
            "expert_feed_forward_length": "intermediate_size",
        },
        {**SILU, "attention_bias": True, "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        period=2, always_slides=True, head="own", has_any_width=True,
    ),
    "starcoder2": GGUFFamily(
        "starcoder2", {"attention.layer_norm_epsilon": "norm_epsilon"}, {"hidden_act": TANH, "use_bias": True}
    ),
    "stablelm": GGUFFamily(
        "stablelm",
        {**NORM, "use_parallel_residual": "use_parallel_residual"},
        {**SILU, "qk_layernorm": False},
        turns_partly=True, head="own",
    ),
    "phi": GGUFFamily(
        "phi2", NORM, {"hidden_act": "gelu_new", "qk_layernorm": False}, turns_partly=True, head="own"
    ),
    "seed_oss": GGUFFamily(
        "seed_oss", RMS, {**SILU, "attention_out_bias": False, "mlp_bias": False}, has_any_width=True
    ),
    "arcee": GGUFFamily(
        "arcee", RMS, {"hidden_act": "relu2", "attention_bias": False, "mlp_bias": False}, **LLAMA
    ),
    "ernie4_5": GGUFFamily("ernie4_5", RMS, {**SILU, "use_bias": False}, has_any_width=True),
    "olmoe": GGUFFamily(
        "olmoe",
        {**RMS, "expert_count": "num_experts", **USED},
        {**PLAIN, "norm_topk_prob": False, "clip_qkv": None},
        head="own",
    ),
    "qwen2_moe": GGUFFamily(
        "qwen2moe",
        {
            **RMS, "expert_count": "num_experts", **USED, "expert_feed_forward_length": "moe_intermediate_size",
            "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        },
        {**SILU, "norm_topk_prob": False, "mlp_only_layers": [], "decoder_sparse_step": 1},
        head="own",
    ),
    "granitemoe": GGUFFamily(
        "granitemoe", {**RMS, **MULTIPLIERS, "expert_count": "num_local_experts", **USED}, SILU, is_permuted=True
    ),
    "nemotron": GGUFFamily(
        "nemotron", {"attention.layer_norm_epsilon": "norm_eps", "attention.layer_norm_rms_epsilon": "norm_eps"},
        {"hidden_act": "relu2", "attention_bias": False, "mlp_bias": False}, UNSCALED,
        adds_one=True, turns_partly=True, head="own",
    ),
}  # fmt: skip
"""transformers' model type: llama.cpp's side of it."""
BLOCKS_OF_27B = {"gemma2": 46, "gemma3": 62}
"""Blocks by which llama.cpp knows the sizes whose scores are not divided by the root of a head's width."""
LAYERS_OF_NORMS = 64
"""Layers from which on llama.cpp's Command R has norms of q and k, as Command R+."""
STEP_WITHOUT_POSITIONS = 4
"""Every so many-th layer of SmolLM3 has no positions."""


def model_type_of(fields: Mapping[str, Any]) -> str | None:
    """Return transformers' model type of a file's metadata; None for a family not listed here."""
    architecture = fields.get("general.architecture")
    if architecture == "llama" and fields.get("llama.expert_count"):
        return "mixtral"
    if architecture == "olmo2" and fields.get("olmo2.attention.sliding_window"):
        return "olmo3"
    return next((name for name, family in FAMILIES.items() if family.architecture == architecture), None)


def check_family(model_type: str) -> None:
    """Raise GGUFModelError for a family that is not listed here."""
    if model_type not in FAMILIES:
        raise GGUFModelError(
            f"format=gguf: the metadata of {model_type} is not known here, only that of {', '.join(FAMILIES)}; "
            "`lightning-peft merge` and llama.cpp's convert_hf_to_gguf.py do it"
        )


def check_computed(config: PreTrainedConfig, tied: bool) -> None:
    """Raise GGUFModelError for a model that llama.cpp would compute otherwise; `tied` is whether its head is shared."""
    family, known = FAMILIES[config.model_type], family_needs(config)
    for option, needed in known.items():
        value = getattr(config, option, None)
        if value != needed and (value or needed):
            raise refused(config, f"has no {option}={value!r}, only {needed!r}")
    for option in family.fields.values():
        if getattr(config, option, None) is None and option not in family.optional:
            raise refused(config, f"has no {option}=null")
    if not family.has_any_width and head_width(config) * config.num_attention_heads != config.hidden_size:
        raise refused(config, f"has no head_dim={head_width(config)} but hidden_size / num_attention_heads")
    if family.head == "tied" and not tied:
        raise refused(config, "takes its embedding for the head, and this model has one of its own")


def family_needs(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the options that llama.cpp has one value of, for a model of this size."""
    family, sizes = FAMILIES[config.model_type], vars(config)
    needs: dict[str, Any] = dict(family.needs)
    if hasattr(config, "query_pre_attn_scalar"):
        needs["query_pre_attn_scalar"] = score_width(family.architecture, config)
    if config.model_type == "cohere":
        needs["use_qk_norm"] = sizes["num_hidden_layers"] >= LAYERS_OF_NORMS
    if config.model_type == "olmoe":
        needs["num_key_value_heads"] = sizes["num_attention_heads"]  # its norm of k is as wide as that of q
    if config.model_type == "smollm3":
        needs["no_rope_layers"] = [
            int((layer + 1) % STEP_WITHOUT_POSITIONS != 0) for layer in range(sizes["num_hidden_layers"])
        ]
    return needs


def score_width(architecture: str, config: Any) -> int:
    """Return the number whose root Gemma's scores are divided by in llama.cpp."""
    if config.num_hidden_layers == BLOCKS_OF_27B[architecture]:
        return int(config.hidden_size // config.num_attention_heads)
    return int(config.head_dim)


def refused(config: PreTrainedConfig, what: str) -> GGUFModelError:
    return GGUFModelError(
        f"format=gguf: llama.cpp's {FAMILIES[config.model_type].architecture} {what}; use `lightning-peft merge`, and "
        "an engine that runs transformers' models"
    )


def head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
