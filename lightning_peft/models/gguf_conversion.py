"""Convert a GGUF file of the Llama and Qwen families for transformers: configuration, weights, tokenizer.

transformers converts any GGUF file, in 10 to 40 seconds for SmolLM2-135M; this takes about one and gives the same
weights bit for bit. A file with anything not listed here is left to transformers.
"""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lightning_peft.models.gguf import GGUFFile, open_gguf
from lightning_peft.models.gguf_fields import check_fields

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
NEEDED = ("block_count", "feed_forward_length", "embedding_length", "attention.head_count")
"""Fields without which nobody can compute the model."""
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
"""The steps that split text before byte-pair merging, by tokenizer.ggml.pre."""

ROPE_FACTORS = "rope_freqs.weight"
"""Divisors of the rotary frequencies: how llama.cpp stores Llama 3.1's scaling."""
CONTROL = 3
"""Token type of special tokens."""


def parameter_name(name: str) -> str | None:
    """Return the parameter of a GGUF tensor; None for one not listed here."""
    module, _, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias"):
        return None
    if block := re.fullmatch(r"blk\.(\d+)\.(\w+)", module):
        number, part = block.groups()
        return f"model.layers.{number}.{BLOCK_MODULES[part]}.{leaf}" if part in BLOCK_MODULES else None
    return f"{MODULES[module]}.{leaf}" if module in MODULES else None


def open_model(path: str | Path) -> GGUFFile:
    """Return the file of a whole model. Raises ValueError for one of something else, or of a part."""
    file = open_gguf(path)
    if (kind := file.fields.get("general.type", "model")) != "model":
        raise ValueError(f"model.path={path}: holds no model but what it calls {kind}; give the file of its base")
    if (parts := file.fields.get("split.count", 1)) > 1:
        raise ValueError(
            f"model.path={path}: is one of {parts} parts of a model; put them together by llama-gguf-split --merge"
        )
    return file


def is_known(file: GGUFFile) -> bool:
    """Return whether every tensor and the position encoding of the file are ones this module converts."""
    scaling, _ = rope_scaling(file)
    tensors = (name for name in file.tensors if name != ROPE_FACTORS)
    is_ours = file.fields.get("general.architecture") in ARCHITECTURES
    return is_ours and scaling in ("none", "linear", "yarn") and all(map(parameter_name, tensors))


def check_read(file: GGUFFile, model: PreTrainedModel) -> None:
    """Raise ValueError for what a file holds and transformers, which is to read it into `model`, passes over.

    Also for what `model` needs and the file lacks, which transformers draws at random. A model on the meta device will
    do.
    """
    scaling, _ = rope_scaling(file)
    if scaling != "none":
        raise ValueError(
            f"model.path={file.path}: transformers does not read its {scaling} scaling of positions; use the model's "
            "safetensors files"
        )
    processor = TENSOR_PROCESSORS.get(str(file.fields.get("general.architecture")), TensorProcessor)(config={})
    read = get_gguf_hf_weights_map(model, processor)
    if unread := [name for name in file.tensors if not {name, name.removesuffix(".weight")} & read.keys()]:
        raise ValueError(
            f"model.path={file.path}: transformers does not read {len(unread)} of its tensors, such as {unread[0]}: "
            "use the model's safetensors files"
        )
    if lacking := _lacking(file, model, read):
        raise ValueError(
            f"model.path={file.path}: lacks {len(lacking)} weights of {type(model).__name__}, such as {lacking[0]}; "
            "fetch the file again, or use the model's safetensors files"
        )
    check_fields(file, model.config)


def _lacking(file: GGUFFile, model: PreTrainedModel, read: Mapping[str, str]) -> list[str]:
    """Return the parameters that no tensor of the file fills, or not all that make it; `read` names them by tensor."""
    sources: dict[str, list[bool]] = {}
    for tensor, name in read.items():
        sources.setdefault(name, []).append(bool({tensor, f"{tensor}.weight"} & file.tensors.keys()))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    filled = {id(parameters[name]) for name, found in sources.items() if name in parameters and all(found)}
    return [name for name, parameter in parameters.items() if id(parameter) not in filled]


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


def rope_parameters(file: GGUFFile, head_dim: int) -> dict[str, Any]:
    """Return how positions are encoded, in transformers' words."""
    theta = _rope_field(file, "freq_base", 10000.0)
    scaling, factor = rope_scaling(file)
    if ROPE_FACTORS in file.tensors:
        factors = file.read(ROPE_FACTORS, torch.float32)
        if factors.shape != (head_dim // 2,):
            raise ValueError(
                f"model.path={file.path}: {ROPE_FACTORS} has {factors.numel()} factors, and heads of {head_dim} need "
                f"{head_dim // 2}"
            )
        context = file.fields[f"{file.fields['general.architecture']}.context_length"]
        return llama3_parameters(factors, theta, head_dim) or {
            "rope_type": "longrope",
            "rope_theta": theta,
            "short_factor": factors.tolist(),
            "long_factor": factors.tolist(),
            "attention_factor": 1.0,
            "original_max_position_embeddings": context,
        }
    if scaling == "none":
        return {"rope_type": "default", "rope_theta": theta}
    parameters = {"rope_type": scaling, "rope_theta": theta, "factor": factor}
    if scaling == "yarn":
        for key in ("beta_fast", "beta_slow"):
            if (beta := _rope_field(file, f"scaling.yarn_{key}")) is not None:
                parameters[key] = beta
        context = file.fields.get(f"{file.fields['general.architecture']}.context_length")
        parameters["original_max_position_embeddings"] = _rope_field(file, "scaling.original_context_length", context)
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


def gguf_config(file: GGUFFile) -> PreTrainedConfig:
    """Return the model configuration, from the file's metadata."""
    prefix = file.fields["general.architecture"]
    present = {name.removeprefix(f"{prefix}."): value for name, value in file.fields.items()}
    for name in CONFIG_KEYS.keys() & present.keys():
        if isinstance(each := present[name], list):  # one for each block
            if len(set(each)) != 1:
                raise ValueError(
                    f"model.path={file.path}: {prefix}.{name}={each} differs by block, which transformers has no place "
                    f"for in {ARCHITECTURES[prefix]}"
                )
            present[name] = each[0]
    if lacking := [name for name in NEEDED if name not in present]:
        raise ValueError(f"model.path={file.path}: has no {prefix}.{lacking[0]}; fetch the file again")
    values = {ours: present[theirs] for theirs, ours in CONFIG_KEYS.items() if theirs in present}
    values.setdefault("vocab_size", file.tensors["token_embd.weight"].shape[0])
    head_dim = present.get("attention.key_length") or values["hidden_size"] // values["num_attention_heads"]
    values["head_dim"] = head_dim
    values["rope_parameters"] = rope_parameters(file, head_dim)
    if prefix == "llama":
        values["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
    if prefix in ("llama", "qwen3"):
        values["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    values |= {f"{name}_id": file.fields.get(f"tokenizer.ggml.{key}") for name, key in TOKEN_KEYS.items()}
    values["tie_word_embeddings"] = "output.weight" not in file.tensors
    model_type = ARCHITECTURES[prefix]
    config = AutoConfig.for_model(model_type, **values)
    check_fields(file, config)
    return config


def check_has_places(file: GGUFFile, model: PreTrainedModel) -> None:
    """Raise ValueError for a tensor of a known file that the built model has no parameter for, such as a bias."""
    places = model.state_dict().keys()
    if lost := [name for name in file.tensors if name != ROPE_FACTORS and parameter_name(name) not in places]:
        raise ValueError(
            f"model.path={file.path}: {type(model).__name__} has no place for {len(lost)} of its tensors, such as "
            f"{lost[0]}: use the model's safetensors files"
        )


class GGUFSource:
    """The weights of a known file under transformers' parameter names."""

    def __init__(self, file: GGUFFile):
        self.file = file
        self.keys = {str(parameter_name(name)): name for name in file.tensors if name != ROPE_FACTORS}
        prefix = file.fields["general.architecture"]
        self.heads: dict[str, int] = {}
        """Heads whose rows llama.cpp interleaves, by module: in the llama architecture alone."""
        if prefix == "llama":
            config: Any = gguf_config(file)
            self.heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}

    def names(self) -> list[str]:
        return list(self.keys)

    def read(self, name: str, dtype: torch.dtype | None) -> Tensor:
        tensor = self.file.read(self.keys[name], dtype or torch.float32)
        heads = self.heads.get(name.split(".")[-2])
        return tensor if heads is None else halves_from_pairs(tensor, heads)


def halves_from_pairs(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of each head from llama.cpp's order (rotary pairs) to transformers' (the two halves apart)."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def pairs_from_halves(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of each head from transformers' order to llama.cpp's: the inverse of `halves_from_pairs`."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def gguf_tokenizer(file: GGUFFile) -> PreTrainedTokenizerFast | None:
    """Return the tokenizer, from the file's metadata; None for a kind not listed here."""
    field = partial(_tokenizer_field, file)
    if field("model") != "gpt2" or field("pre") not in PRE_TOKENIZERS:
        return None
    tokens = field("tokens")
    merges = [tuple(merge.split(" ")) for merge in field("merges") or [] if " " in merge]  # else it stands for none
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
