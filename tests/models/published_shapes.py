"""Sizes of the models that `model=NAME` names, as their published config.json has them, without their weights."""

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig


def attention_at(every: int, offset: int, layers: int) -> list[str]:
    return ["attention" if i % every == offset else "mamba" for i in range(layers)]


def sizes(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, words: int, **others: Any) -> dict[str, Any]:
    return dict(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=words,
        **others,
    )


QWEN3: dict[str, Any] = dict(words=151936, head_dim=128)
GEMMA3: dict[str, Any] = dict(words=262208, head_dim=256)
GEMMA4: dict[str, Any] = dict(words=262144, head_dim=256, hidden_size_per_layer_input=0, attention_k_eq_v=True)
GPT_OSS: dict[str, Any] = dict(words=201088, head_dim=64, num_experts_per_tok=4)

SHAPES: dict[str, tuple[str, dict[str, Any], float]] = {
    "qwen3_0_6b": ("qwen3", sizes(1024, 3072, 28, 16, 8, **QWEN3, tie_word_embeddings=True), 0.596),
    "qwen3_4b": ("qwen3", sizes(2560, 9728, 36, 32, 8, **QWEN3, tie_word_embeddings=True), 4.02),
    "qwen3_8b": ("qwen3", sizes(4096, 12288, 36, 32, 8, **QWEN3), 8.19),
    "qwen3_14b": ("qwen3", sizes(5120, 17408, 40, 40, 8, **QWEN3), 14.8),
    "qwen3_32b": ("qwen3", sizes(5120, 25600, 64, 64, 8, **QWEN3), 32.8),
    "qwen3_30b_a3b": (
        "qwen3_moe",
        sizes(2048, 6144, 48, 32, 4, **QWEN3, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8),
        30.5,
    ),
    "qwen3_5_9b": ("qwen3_5_text", sizes(4096, 12288, 32, 16, 4, 248320, head_dim=256), 8.95),
    "qwen3_5_27b": (
        "qwen3_5_text",
        sizes(5120, 17408, 64, 24, 4, 248320, head_dim=256, linear_num_value_heads=48),
        27,
    ),
    "qwen3_5_35b_a3b": (
        "qwen3_5_moe_text",
        dict(
            hidden_size=2048,
            num_hidden_layers=40,
            num_attention_heads=16,
            num_key_value_heads=2,
            vocab_size=248320,
            moe_intermediate_size=512,
            num_experts=256,
            num_experts_per_tok=8,
        ),
        35,
    ),
    "llama_3_1_8b_instruct": ("llama", sizes(4096, 14336, 32, 32, 8, 128256), 8.03),
    "llama_3_2_1b_instruct": ("llama", sizes(2048, 8192, 16, 32, 8, 128256, tie_word_embeddings=True), 1.24),
    "llama_3_2_3b_instruct": ("llama", sizes(3072, 8192, 28, 24, 8, 128256, tie_word_embeddings=True), 3.21),
    "llama_3_3_70b_instruct": ("llama", sizes(8192, 28672, 80, 64, 8, 128256), 70.6),
    "gemma_3_1b": ("gemma3_text", sizes(1152, 6912, 26, 4, 1, 262144, head_dim=256), 1.0),
    "gemma_3_4b": ("gemma3_text", sizes(2560, 10240, 34, 8, 4, **GEMMA3), 3.88),
    "gemma_3_12b": ("gemma3_text", sizes(3840, 15360, 48, 16, 8, **GEMMA3), 11.8),
    "gemma_3_27b": ("gemma3_text", sizes(5376, 21504, 62, 32, 16, words=262208, head_dim=128), 27),
    "gemma_4_26b_a4b": (
        "gemma4_text",
        sizes(
            2816,
            2112,
            30,
            16,
            8,
            **GEMMA4,
            num_global_key_value_heads=2,
            enable_moe_block=True,
            num_experts=128,
            top_k_experts=8,
            moe_intermediate_size=704,
        ),
        25.2,
    ),
    "gemma_4_31b": ("gemma4_text", sizes(5376, 21504, 60, 32, 16, **GEMMA4, num_global_key_value_heads=4), 30.7),
    "mistral_small_3_2": ("mistral", sizes(5120, 32768, 40, 32, 8, 131072, head_dim=128), 23.6),
    "phi_4": ("phi3", sizes(5120, 17920, 40, 40, 10, 100352, pad_token_id=0), 14.7),
    "phi_4_mini": ("phi3", sizes(3072, 8192, 32, 24, 8, 200064, tie_word_embeddings=True, pad_token_id=0), 3.84),
    "gpt_oss_20b": ("gpt_oss", sizes(2880, 2880, 24, 64, 8, **GPT_OSS, num_local_experts=32), 20.9),
    "gpt_oss_120b": ("gpt_oss", sizes(2880, 2880, 36, 64, 8, **GPT_OSS, num_local_experts=128), 117),
    "smollm3_3b": ("smollm3", sizes(2048, 11008, 36, 16, 4, 128256, tie_word_embeddings=True), 3.08),
    "granite_4_0_micro": (
        "granitemoehybrid",
        sizes(
            2560,
            8192,
            40,
            40,
            8,
            100352,
            tie_word_embeddings=True,
            shared_intermediate_size=8192,
            num_local_experts=0,
            num_experts_per_tok=0,
            layer_types=attention_at(1, 0, 40),
        ),
        3.4,
    ),
    "granite_4_0_h_small": (
        "granitemoehybrid",
        sizes(
            4096,
            768,
            40,
            32,
            8,
            100352,
            tie_word_embeddings=True,
            shared_intermediate_size=1536,
            num_local_experts=72,
            num_experts_per_tok=10,
            mamba_d_state=128,
            layer_types=attention_at(10, 5, 40),
        ),
        32.2,
    ),
}
"""Preset -> model type, sizes, and published parameters in billions; the language model alone where there is a tower.

Llama 3.1 and older presets are not here: benchmarks/shapes.py has what is measured of them.
"""

EVERYDAY = ["qwen3_8b", "qwen3_5_9b", "llama_3_2_1b_instruct", "gemma_3_4b", "phi_4_mini", "gpt_oss_20b"]
"""Shapes of most families, one each, cheap enough to be trained at their widths."""


def shape(name: str) -> PreTrainedConfig:
    model_type, values, _ = SHAPES[name]
    return CONFIG_MAPPING[model_type](**values)


def first_layers(name: str, layers: int, words: int, experts: int) -> PreTrainedConfig:
    """Return a shape with all widths and fewer layers, words and experts."""
    config = shape(name)
    kinds = getattr(config, "layer_types", None)
    config.num_hidden_layers, config.vocab_size, config.pad_token_id = layers, words, 0
    if kinds is not None:
        config.layer_types = [kinds[0], *kinds[1 - layers :]]
    for key in ("num_experts", "num_local_experts"):
        if getattr(config, key, None):
            setattr(config, key, experts)
    return config
