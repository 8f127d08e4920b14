"""What a GGUF file of the Llama and Qwen families means to transformers: configuration, weights, tokenizer.

transformers converts any GGUF file, in 10 to 40 seconds for SmolLM2-135M; this takes about one and gives the same
weights bit for bit. A file with anything not listed here is left to transformers.
"""

import re
from functools import partial
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerFast

from lightning_peft.models.gguf import GGUFFile

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""GGUF architecture: transformers' model type."""

CONFIG_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
TOKEN_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
"""Name in transformers: key under tokenizer.ggml."""

MODULES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
PRE_TOKENIZERS = {
    "smollm": lambda: [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
}
"""How text is split before byte-pair merging, by tokenizer.ggml.pre."""

CONTROL = 3
"""Token type of special tokens."""


def parameter_name(name: str) -> str | None:
    """The parameter of a GGUF tensor; None for one not listed here."""
    module, _, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias"):
        return None
    if block := re.fullmatch(r"blk\.(\d+)\.(\w+)", module):
        number, part = block.groups()
        return f"model.layers.{number}.{BLOCK_MODULES[part]}.{leaf}" if part in BLOCK_MODULES else None
    return f"{MODULES[module]}.{leaf}" if module in MODULES else None


def is_known(file: GGUFFile) -> bool:
    """Whether every tensor and the position encoding of the file are ones this module converts."""
    architecture = file.fields.get("general.architecture")
    scaling = file.fields.get(f"{architecture}.rope.scaling.type", "none")
    return architecture in ARCHITECTURES and scaling == "none" and all(map(parameter_name, file.tensors))


def gguf_config(file: GGUFFile) -> PreTrainedConfig:
    """The model configuration, from the file's metadata."""
    prefix = file.fields["general.architecture"]
    present = {name.removeprefix(f"{prefix}."): value for name, value in file.fields.items()}
    values = {ours: present[theirs] for theirs, ours in CONFIG_KEYS.items() if theirs in present}
    values.setdefault("vocab_size", file.tensors["token_embd.weight"].shape[0])
    for dimension in ("rope.dimension_count", "attention.key_length"):
        if dimension in present:
            values["head_dim"] = present[dimension]
    if "rope.freq_base" in present:
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": present["rope.freq_base"]}
    values |= {f"{name}_id": file.fields.get(f"tokenizer.ggml.{key}") for name, key in TOKEN_KEYS.items()}
    values["tie_word_embeddings"] = "output.weight" not in file.tensors
    model_type = ARCHITECTURES[prefix]
    return AutoConfig.for_model(model_type, **values)


class GGUFSource:
    """The weights of a known file under transformers' parameter names."""

    def __init__(self, file: GGUFFile):
        self.file = file
        self.keys = {str(parameter_name(name)): name for name in file.tensors}
        prefix = file.fields["general.architecture"]
        self.heads: dict[str, int] = {}
        """Heads whose rows llama.cpp interleaves, by module: in the llama architecture alone."""
        if prefix == "llama":
            queries = file.fields["llama.attention.head_count"]
            self.heads = {"q_proj": queries, "k_proj": file.fields.get("llama.attention.head_count_kv", queries)}

    def names(self) -> list[str]:
        return list(self.keys)

    def read(self, name: str, dtype: torch.dtype | None) -> Tensor:
        tensor = self.file.read(self.keys[name], dtype or torch.float32)
        heads = self.heads.get(name.split(".")[-2])
        return tensor if heads is None else halves_from_pairs(tensor, heads)


def halves_from_pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from llama.cpp's order (rotary pairs side by side) to transformers' (the two halves apart)."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def gguf_tokenizer(file: GGUFFile) -> PreTrainedTokenizerFast | None:
    """The tokenizer, from the file's metadata; None for a kind not listed here."""
    field = partial(_tokenizer_field, file)
    if field("model") != "gpt2" or field("pre") not in PRE_TOKENIZERS:
        return None
    tokens = field("tokens")
    merges = [tuple(merge.split(" ")) for merge in field("merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[field("pre")]())
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, field("token_type"), strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    named = {name: tokens[number] for name, key in TOKEN_KEYS.items() if (number := field(key)) is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=file.fields.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        additional_special_tokens=[token for token in special if token not in named.values()],
        add_bos_token=field("add_bos_token") or False,
        **named,
    )


def _tokenizer_field(file: GGUFFile, key: str) -> Any:
    return file.fields.get(f"tokenizer.ggml.{key}")
