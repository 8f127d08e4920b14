"""The prompt an adapter was trained with, in the words of other engines, and how long a prompt can be."""

import json
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lightning_peft.data.layout import PromptLayout

TEMPLATE_NAME = "chat_template.jinja"
NFC_SHRINKS = 4
"""Bytes of UTF-8 of which NFC makes no less than one: 7 become 2 at worst (U+1FBE U+0308 U+0301 are U+0390)."""


def template_as_trained(layout: PromptLayout, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the chat template of an adapter; one that adds what the training added where a chat brings none.

    That is the system prompt, tools, and variables of the template. The result is None for text without turns.
    """
    template = layout.template or tokenizer.chat_template
    if layout.kind != "chat" or not isinstance(template, str):
        return None
    given = {name: f"{name} is not defined" for name in layout.template_options}
    values: dict[str, Any] = dict(layout.template_options)
    if layout.tools:
        given["tools"], values["tools"] = "not tools", layout.tools
    added = [f"{{%- if {given[name]} %}}{{%- set {name} = {literal(values[name])} %}}{{%- endif %}}" for name in given]
    if layout.system_prompt is not None:
        turn = literal({"role": "system", "content": layout.system_prompt})
        added.append(
            "{%- if not messages or messages[0]['role'] != 'system' %}"
            f"{{%- set messages = [{turn}] + messages %}}{{%- endif %}}"
        )
    return "".join([*added, template])


def literal(value: Any) -> str:
    """Return a value of JSON as Jinja writes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(key)}: {literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(literal, value)) + "]"
    # JSON's strings are Jinja's, but for escapes beyond ASCII, which are left as they are.
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def stop_texts(layout: PromptLayout, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the tokens at which an answer ends, as text."""
    return [str(tokenizer.decode([number])) for number in layout.stop_token_ids]


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer puts its first token before every text, as engines then do too."""
    return tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id


def most_bytes_a_token(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """Return how many bytes of a text a token stands for at most; None where a tokenizer may drop or join some.

    It drops none where every byte has a token (byte-level BPE, or BPE with a fallback to bytes), nothing before it does
    but splitting, NFC and replacements by something longer, and no added token takes the blanks around it.
    """
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    normalizers, splitters = _steps(parts["normalizer"]), _steps(parts["pre_tokenizer"])
    vocabulary, model = tokenizer.get_vocab(), parts["model"]
    if any(step["type"] == "ByteLevel" for step in splitters):
        letters = ByteLevel.alphabet()
    else:
        letters = [f"<0x{byte:02X}>" for byte in range(256)] if model.get("byte_fallback") else [""]
    if model["type"] != "BPE" or not vocabulary.keys() >= set(letters):
        return None
    if not all(map(_grows, normalizers)) or not all(map(_keeps, splitters)):
        return None
    if any(token["lstrip"] or token["rstrip"] for token in parts["added_tokens"]):
        return None
    shrinks = NFC_SHRINKS if any(step["type"] == "NFC" for step in normalizers) else 1
    return shrinks * max(len(token.encode()) for token in vocabulary)  # a token is no shorter as written than read


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return a part of a tokenizer as its steps."""
    if part is None:
        return []
    inner = part.get("normalizers") or part.get("pretokenizers")
    return [part] if part["type"] != "Sequence" else [step for each in inner or [] for step in _steps(each)]


def _grows(normalizer: dict[str, Any]) -> bool:
    """Return whether a normaliser leaves a text as long as it was or makes it longer, but for NFC."""
    if normalizer["type"] == "Replace":
        pattern = normalizer["pattern"].get("String")
        return pattern is not None and len(normalizer["content"].encode()) >= len(pattern.encode())
    return normalizer["type"] in ("NFC", "Prepend")


def _keeps(splitter: dict[str, Any]) -> bool:
    """Return whether what is split is all of a text."""
    if splitter["type"] in ("Split", "Punctuation"):
        return bool(splitter["behavior"] != "Removed")
    return splitter["type"] in ("ByteLevel", "Digits", "Metaspace")
