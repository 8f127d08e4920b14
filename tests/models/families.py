"""Small random models of several architectures."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "n_embd": 64, "n_layer": 2, "n_head": 4,
    "n_positions": 64, "n_inner": 96, "ffn_dim": 96, "word_embed_proj_dim": 64, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1,
    "sliding_window": 5, "use_sliding_window": True, "max_window_layers": 0, "attention_dropout": 0.0,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "dropout": 0.0, "activation_dropout": 0.0,
    "hidden_dropout": 0.0, "layerdrop": 0.0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""Every name for a size that a configuration class may use."""

FAMILIES = ["llama", "qwen2", "gpt2", "mistral", "gemma2", "gpt_neox", "phi3"]


MOST_USED = """
llama qwen2 qwen3 qwen3_moe qwen3_next qwen3_5_text gemma2 gemma3_text gemma4_text mistral mixtral phi3 phimoe gpt_oss
granite granitemoe smollm3 olmo2 olmo3 deepseek_v3 glm4_moe falcon_h1 nemotron_h bamba cohere2 gpt2 llama4_text
""".split()
"""Families of the default suite."""
EVERY = f"""
{" ".join(MOST_USED)} afmoe apertus arcee bart biogpt bitnet bloom codegen cohere cwm dbrx deepseek_v2 diffllama doge
dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon falcon_mamba flex_olmo gemma gemma3n_text glm glm4 gpt_bigcode
gpt_neo gpt_neox gptj granitemoehybrid granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hyperclovax
inkling_text jais2 jamba jetmoe kimi_linear lfm2 lfm2_moe longcat_flash mamba mamba2 mimo_v2_flash minicpm3 minimax
minimax_m2 ministral mpt nanochat nemotron olmo olmo_hybrid olmoe opt persimmon phi qwen2_moe recurrent_gemma rwkv
seed_oss stablelm starcoder2 xglm xlstm zamba2 modernbert-decoder
""".split()


RECURRENT = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_chunk_size": 16,
    "mamba_expand": 2,
}  # fmt: skip
DELTA_NET = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}  # fmt: skip
OPTIONS: dict[str, dict[str, object]] = {
    "falcon_h1": {**RECURRENT, "mamba_d_ssm": 128, "lm_head_multiplier": 0.25},
    "bamba": {**RECURRENT, "attn_layer_indices": [1]},
    "recurrent_gemma": {"num_key_value_heads": 1, "lru_width": 64, "block_types": ["recurrent", "attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "mamba": {"state_size": 16, "time_step_rank": 16},
    "mamba2": {
        "state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 16, "expand": 2,
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention"], "ssm_state_size": 16, "mamba_num_heads": 8, "mamba_head_dim": 16,
        "n_groups": 1, "chunk_size": 16,
    },
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "mamba_d_state": 16, "mamba_dt_rank": 16, "use_mamba_kernels": False,
    },
    "gemma3n_text": {
        "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 16, "laurel_rank": 16,
        "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"],
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "zamba2": {
        "num_hidden_layers": 4, "num_key_value_heads": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "mamba_d_state": 16, "mamba_ngroups": 1, "n_mamba_heads": 8, "mamba_headdim": 16, "chunk_size": 16,
        "num_mem_blocks": 1, "adapter_rank": 16,
    },
    "deepseek_v3": {
        "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 4,
    },
    "gemma4_text": {
        "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0,
        "global_head_dim": 16, "layer_types": ["sliding_attention", "full_attention"], "final_logit_softcapping": 3.0,
    },
    "bart": {
        "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96,
    },
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "dbrx": {
        "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "deepseek_v2": {
        "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 4,
    },
    "kimi_linear": {
        **LATENT, "linear_num_heads": 4, "linear_head_dim": 16, "layer_types": ["linear_attention", "full_attention"],
    },
    "longcat_flash": LATENT,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "falcon_mamba": {"state_size": 16, "time_step_rank": 16},
    "granitemoehybrid": {
        **RECURRENT, "layer_types": ["mamba", "attention"], "num_local_experts": 0, "num_experts_per_tok": 0,
        "shared_intermediate_size": 96, "logits_scaling": 8.0,
    },
    "xglm": {"d_model": 64, "num_layers": 2, "attention_heads": 4},
    "xlstm": {"num_heads": 4, "chunk_size": 16, "output_logit_soft_cap": 3.0},
    "rwkv": {"attention_hidden_size": 64, "context_length": 64, "rescale_every": 1},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "window_size": 5, "attention_types": [[["global", "local"], 1]]},
    "qwen3_next": DELTA_NET,
    "qwen3_5_text": DELTA_NET,
    "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2},
    "llama4_text": {"intermediate_size_mlp": 96, "moe_layers": [1], "no_rope_layers": [1, 0]},
    "minicpm3": {
        "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
        "v_head_dim": 16,
    },
}  # fmt: skip
"""Options that a family's configuration needs beside the sizes."""

SLIDES, FULL = "sliding_attention", "full_attention"
LINEAR_GLOBALLY = {
    FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, SLIDES: {"rope_type": "default", "rope_theta": 1e4}
}  # fmt: skip
OF_GGUF: dict[str, dict[str, object]] = {
    "mistral": {"sliding_window": None},
    "mixtral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"use_sliding_window": False},
    "qwen3_moe": {"use_sliding_window": False, "norm_topk_prob": True},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {
        "query_pre_attn_scalar": 16, "num_hidden_layers": 7, "layer_types": [*[SLIDES] * 5, FULL, SLIDES],
        "rope_parameters": LINEAR_GLOBALLY,
    },
    "phi3": {"sliding_window": None},
    "smollm3": {"num_hidden_layers": 5, "use_sliding_window": False},
    "granite": {
        "attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 4.0,
    },
    "olmo": {"clip_qkv": 0.5},
    "gpt_oss": {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 150000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "truncate": False, "original_max_position_embeddings": 16,
        },
    },
    "cohere2": {"rotary_pct": 1.0, "num_hidden_layers": 4, "layer_types": [SLIDES, SLIDES, SLIDES, FULL]},
    "starcoder2": {"sliding_window": None},
    "olmoe": {"num_key_value_heads": 4},
    "qwen2_moe": {"use_sliding_window": False},
    "granitemoe": {
        "attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 4.0,
    },
    "phi": {"intermediate_size": 256, "num_key_value_heads": 4},
}  # fmt: skip
"""Options with which llama.cpp computes a small model of a family as transformers does, each of its parts at work."""


def _takes(config: object, name: str) -> bool:
    try:
        return hasattr(config, name)
    except AmbiguousGlobalPerLayerAttributeError:  # every layer has its own
        return True


def small_model(model_type: str, seed: int = 0, **options: object) -> PreTrainedModel:
    """Return a two-layer model with weights large enough for attention to matter, in fp32 and eval mode.

    Layer kinds that alternate, such as sliding and full attention, both occur.
    """
    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    values = {name: value for name, value in SIZES.items() if _takes(default, name)}
    values |= {**OPTIONS.get(model_type, {}), **options}
    try:
        config = config_class(**values)
    except (TypeError, AttributeError, ValueError):
        config = config_class(**{name: value for name, value in values.items() if name != "head_dim"})
    count = int(values.get("num_hidden_layers", 2))
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or []))
    if kinds and model_type not in OPTIONS and "layer_types" not in options:
        config = config_class(**values, layer_types=(kinds * count)[:count])
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2, generator=generator)
            elif model_type == "gemma3n_text" and not parameter.any():
                # transformers begins with a scale of 0, which cuts the inputs of each layer off.
                parameter.normal_(0, 0.2, generator=generator)
    return model
