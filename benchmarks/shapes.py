"""Shapes of real models, written as folders without weights: `train model.random_weights=true` draws them."""

from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from lightning_peft.models.tiny import tiny_tokenizer

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=320,
    ),
    "smollm2_135m": dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, tie_word_embeddings=True,
    ),
    "smollm2_360m": dict(
        hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15, num_key_value_heads=5,
        vocab_size=49152, tie_word_embeddings=True,
    ),
    "llama_1b": dict(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, rope_theta=500000.0, tie_word_embeddings=True,
    ),
    "llama_8b": dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, rope_theta=500000.0,
    ),
    "llama_70b": dict(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=128256, rope_theta=500000.0,
    ),
}  # fmt: skip
"""Published sizes of SmolLM2 and Llama 3; tiny is for tests."""

LONGEST_CONTEXT = 2**20
"""Positions the configurations allow: rotary positions cost nothing until they are used."""


def write_shape(name: str, folder: Path) -> list[str]:
    """Write the configuration and a tokenizer of bytes to `folder`; return the overrides that train on it."""
    # Token 2 ends a turn and 0 pads, as the tokenizer has them.
    config = LlamaConfig(
        **SHAPES[name], max_position_embeddings=LONGEST_CONTEXT, bos_token_id=None, eos_token_id=2, pad_token_id=0
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = LONGEST_CONTEXT
    tokenizer.save_pretrained(folder)
    return ["model=hf", f"model.path={folder}", "model.random_weights=true"]
