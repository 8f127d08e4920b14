"""The tokenizer of a GGUF file: byte-level BPE by the name that llama.cpp has for how a text is split before."""

from collections.abc import Callable
from functools import partial
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_peft.models.gguf import GGUFFile
from lightning_peft.models.gguf_config import TOKEN_KEYS

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace("{1,3}", "")
GPT_4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Regexes by which tokenizers split a text."""


def at(regex: str) -> list[pre_tokenizers.PreTokenizer]:
    """Return the steps of a tokenizer that splits by a regex."""
    return [pre_tokenizers.Split(Regex(regex), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]


PRE_TOKENIZERS: dict[str, Callable[[], list[pre_tokenizers.PreTokenizer]]] = {
    "smollm": lambda: [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "gpt-2": lambda: [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": partial(at, LLAMA_3),
    "dbrx": partial(at, LLAMA_3),
    "qwen2": partial(at, QWEN_2),
    "gpt-4o": partial(at, GPT_4O),
}
"""The steps that split text before byte-pair merging, by tokenizer.ggml.pre."""
WHOLE_WORDS = ("llama-bpe",)
"""Splits of tokenizers that leave a word that is a token as one; texts begin with a token unless a file says no."""
COMPOSED = ("qwen2",)
"""Splits of tokenizers that compose letters first, which llama.cpp leaves out."""
CONTROL, USER_DEFINED = 3, 4
"""Types of special tokens, and of other tokens that no rule makes."""


def gguf_tokenizer(file: GGUFFile) -> PreTrainedTokenizerFast | None:
    """Return the tokenizer, from the file's metadata; None for a kind not listed here."""
    field = partial(_tokenizer_field, file)
    if field("model") != "gpt2" or field("pre") not in PRE_TOKENIZERS or field("token_type") is None:
        return None
    tokens = field("tokens")
    merges = [tuple(merge.split(" ")) for merge in field("merges") or [] if " " in merge]  # else it stands for none
    vocabulary = {token: number for number, token in enumerate(tokens)}
    model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=field("pre") in WHOLE_WORDS)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[field("pre")]())
    if field("pre") in COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    kinds = list(zip(tokens, field("token_type"), strict=True))
    special = [token for token, kind in kinds if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token, kind in kinds if kind == USER_DEFINED])
    named = {name: tokens[number] for name, key in TOKEN_KEYS.items() if (number := field(key)) is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=file.fields.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        additional_special_tokens=[token for token in special if token not in named.values()],
        add_bos_token=field("pre") in WHOLE_WORDS if (adds := field("add_bos_token")) is None else adds,
        **named,
    )


def _tokenizer_field(file: GGUFFile, key: str) -> Any:
    return file.fields.get(f"tokenizer.ggml.{key}")
