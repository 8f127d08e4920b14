"""A tokenizer as llama.cpp has it: byte-level BPE by the way it splits text, and SentencePiece's BPE by scores."""

import json
import re
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerFast

from lightning_peft.serving.prompt import adds_bos

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""llama.cpp's types of tokens."""
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SPLITS = {LLAMA_3: "llama-bpe", LLAMA_3.replace("{1,3}", ""): "qwen2"}
"""The regex by which a tokenizer splits text: llama.cpp's name for it."""
NO_RULE = "none"
"""A rule of no pair, for a tokenizer without rules: llama.cpp refuses a file without any."""
BLANK = "\N{LOWER ONE EIGHTH BLOCK}"
"""SentencePiece's letter for a blank."""


class GGUFModelError(ValueError):
    """A model that cannot be written as a GGUF file here."""


def add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerFast, rows: int) -> None:
    """Add a tokenizer, filled up to the rows of the embedding. Raises GGUFModelError for a kind that is not known."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    is_pieces = content["model"].get("byte_fallback", False)
    special = {entry["id"] for entry in content["added_tokens"] if entry["special"]}
    added = {entry["id"] for entry in content["added_tokens"]}
    texts = {number: text for text, number in tokenizer.get_vocab().items()}

    def kind_of(number: int) -> int:
        if is_pieces and number == tokenizer.unk_token_id:
            return UNKNOWN
        if number in added:
            return CONTROL if number in special else USER_DEFINED
        if is_pieces and re.fullmatch("<0x[0-9A-F]{2}>", texts.get(number, "")):
            return BYTE
        return NORMAL if number in texts else UNUSED

    kinds = [kind_of(number) for number in range(rows)]
    writer.add_tokenizer_model("llama" if is_pieces else "gpt2")
    writer.add_tokenizer_pre("default" if is_pieces else split_name(content))
    writer.add_token_list([texts.get(number, f"[PAD{number}]") for number in range(rows)])
    writer.add_token_types(kinds)
    if is_pieces:
        writer.add_token_scores(scores_of(content, kinds))
        writer.add_add_space_prefix(begins_with_blank(content))
    else:
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
        writer.add_token_merges(merges or [NO_RULE])
    for key in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{key}_token_id")) is not None:
            getattr(writer, f"add_{key}_token_id")(number)
    writer.add_add_bos_token(adds_bos(tokenizer))


def split_name(content: dict[str, Any]) -> str:
    """Return llama.cpp's name for how a tokenizer (its tokenizer.json) splits text before it merges bytes."""
    model, splitter = content["model"], content["pre_tokenizer"] or {}
    parts = splitter["pretokenizers"] if splitter.get("type") == "Sequence" else [splitter]
    kinds = [part.get("type") for part in parts]
    if model["type"] == "BPE" and kinds and kinds[-1] == "ByteLevel":
        if not model["merges"] or (kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"]):
            return "smollm"  # without merges every split gives the same tokens
        if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
            return "gpt-2"
        if kinds == ["Split", "ByteLevel"] and (name := SPLITS.get(parts[0]["pattern"].get("Regex"))):
            return name
    raise GGUFModelError(
        "format=gguf: this tokenizer is none of those written here (byte-level BPE split as in GPT-2, SmolLM, Llama 3 "
        "or Qwen 2, and SentencePiece's BPE as in Llama 2); `lightning-peft merge` and llama.cpp's "
        "convert_hf_to_gguf.py do it"
    )


def scores_of(content: dict[str, Any], kinds: list[int]) -> list[float]:
    """Return the scores of SentencePiece's BPE: 0, -1, -2, ... in the order in which pieces were learnt.

    SentencePiece merges the pair whose piece has the highest score, a tokenizer.json that of the first rule. They are
    one where the pieces that the rules make stand in the order of the rules; else GGUFModelError is raised.
    """
    model = content["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    made = [model["vocab"].get(merge.replace(" ", "", 1)) for merge in merges]
    if None in made or any(first > second for first, second in pairwise(made)) or not normalizes_blanks_alone(content):
        raise GGUFModelError(
            "format=gguf: this tokenizer has a fallback to bytes, and is not SentencePiece's BPE as in Llama 2; "
            "`lightning-peft merge` and llama.cpp's convert_hf_to_gguf.py do it"
        )
    scores, learnt = [], 0
    for kind in kinds:
        scores.append(-float(learnt) if kind == NORMAL else 0.0)
        learnt += kind == NORMAL
    return scores


def normalizes_blanks_alone(content: dict[str, Any]) -> bool:
    """Return whether a tokenizer writes blanks as `BLANK`, and does no more to a text before it merges."""
    normalizer, splitter = content["normalizer"], content["pre_tokenizer"]
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
    prepends = {"type": "Prepend", "prepend": BLANK}
    if splitter is None:
        return replaces in steps and all(step in (replaces, prepends) for step in steps)
    is_metaspace = splitter["type"] == "Metaspace" and splitter["replacement"] == BLANK
    return is_metaspace and not splitter.get("split", True) and not steps


def begins_with_blank(content: dict[str, Any]) -> bool:
    """Return whether a tokenizer puts a blank before a text."""
    normalizer, splitter = content["normalizer"], content["pre_tokenizer"]
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    if splitter is not None:
        return bool(splitter["prepend_scheme"] != "never")
    return any(step["type"] == "Prepend" for step in steps)
