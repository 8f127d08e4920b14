"""A tokenizer as llama.cpp has it: byte-level BPE by the way it splits text, and SentencePiece's BPE by scores."""

import json
import logging
import re
from collections import Counter
from itertools import groupby
from typing import Any

from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from lightning_peft.models.gguf_families import GGUFModelError
from lightning_peft.models.gguf_vocabulary import GPT_4O, LLAMA_3, QWEN_2
from lightning_peft.serving.prompt import adds_bos

logger = logging.getLogger(__name__)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""llama.cpp's types of tokens."""
SPLITS = {LLAMA_3: "dbrx", QWEN_2: "qwen2", GPT_4O: "gpt-4o"}
"""The regex by which a tokenizer splits text: llama.cpp's name for it."""
WHOLE_WORDS = {"dbrx": "llama-bpe"}
"""A split: its name where a word that is a token stays one, whatever the rules make of it."""
NO_RULE = "none"
"""A rule of no pair, for a tokenizer without rules: llama.cpp refuses a file without any."""
PHI_3_LEAVES = {"<unk>", "<s>", "<|endoftext|>"}
"""Tokens of Phi-3 that leave the blanks behind them."""
BLANK = "\N{LOWER ONE EIGHTH BLOCK}"
"""SentencePiece's letter for a blank."""


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


def name_for(tokenizer: PreTrainedTokenizerFast, name: str) -> str:
    """Return the name of a model, with "phi-3" in it where its tokens take the blanks behind them, and only there.

    By that word llama.cpp knows that all but three do. Tokens that take blanks otherwise are said in a line.
    """
    added = tokenizer.added_tokens_decoder.values()
    takers = {token.content for token in added if token.rstrip}
    others = {token.content for token in added} - PHI_3_LEAVES
    before = {token.content for token in added if token.lstrip}
    is_complete = {*PHI_3_LEAVES, "</s>"} <= tokenizer.get_vocab().keys()  # llama.cpp does not load a file without
    if takers and takers == others and not before and is_complete:
        return f"phi-3 {name}"
    if takers or before:
        logger.warning(
            "%d tokens take the blanks around them, such as %s: llama.cpp leaves those in the text",
            len(takers | before), min(takers | before),
        )  # fmt: skip
    return re.sub("(phi)-?(3)", r"\1 \2", name, flags=re.IGNORECASE)


def split_name(content: dict[str, Any]) -> str:
    """Return llama.cpp's name for how a tokenizer (its tokenizer.json) splits text before it merges bytes."""
    model, splitter = content["model"], content["pre_tokenizer"] or {}
    parts = splitter["pretokenizers"] if splitter.get("type") == "Sequence" else [splitter]
    normalizer = (content.get("normalizer") or {}).get("type")
    kinds = [part.get("type") for part in parts]
    name = None
    is_bytes = kinds[-1:] == ["ByteLevel"] and not parts[-1].get("add_prefix_space")
    if model["type"] == "BPE" and is_bytes and normalizer in (None, "NFC"):
        if not model["merges"]:
            return "smollm"  # without merges every split gives the same tokens
        splits_words = parts[-1].get("use_regex", True)
        if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"] and splits_words:
            name = "smollm"
        if kinds == ["ByteLevel"] and splits_words:
            name = "gpt-2"
        if kinds == ["Split", "ByteLevel"] and not splits_words:
            name = SPLITS.get(parts[0]["pattern"].get("Regex"))
    if name is not None and model.get("ignore_merges") and not rules_make_all(model):
        name = WHOLE_WORDS.get(name)
    if name is not None:
        if normalizer == "NFC":
            logger.warning(
                "the tokenizer composes letters (NFC) and llama.cpp does not: a letter written in parts, such as e "
                "and U+0301, has other tokens there"
            )
        return name
    raise GGUFModelError(
        "format=gguf: this tokenizer is none of those written here (byte-level BPE split as in GPT-2, SmolLM, Llama 3, "
        "Qwen 2 or GPT-4o, and SentencePiece's BPE as in Llama 2 or Gemma); `lightning-peft merge` and llama.cpp's "
        "convert_hf_to_gguf.py do it"
    )


def rules_make_all(model: dict[str, Any]) -> bool:
    """Return whether the rules of a BPE model make each of its tokens of the letters that it is written in."""
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    merges = [(first, second) for first, second in pairs]
    rules = BPE(vocab=model["vocab"], merges=merges)
    return all(len(rules.tokenize(token)) == 1 for token in model["vocab"])


def scores_of(content: dict[str, Any], kinds: list[int]) -> list[float]:
    """Return the scores of SentencePiece's BPE: 0, -1, -2, ... in the order in which pieces were learnt.

    SentencePiece merges the pair whose piece has the highest score, a tokenizer.json that of the first rule. They are
    one where all rules that make a piece stand together, but for runs of one letter; else GGUFModelError is raised.
    """
    model = content["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    pieces = [merge.replace(" ", "", 1) for merge in merges]
    stretches = [piece for piece, _ in groupby(pieces)]
    apart = {piece for piece, count in Counter(stretches).items() if count > 1}
    # Gemma's runs of blanks: each rule makes a run longer by what stands right of it, so a run is taken as a whole.
    is_one_order = all(len(set(piece)) == 1 for piece in apart)
    if not is_one_order or not model["vocab"].keys() >= set(pieces) or not normalizes_blanks_alone(content):
        raise GGUFModelError(
            "format=gguf: this tokenizer has a fallback to bytes, and is not SentencePiece's BPE as in Llama 2; "
            "`lightning-peft merge` and llama.cpp's convert_hf_to_gguf.py do it"
        )
    learnt = [model["vocab"][piece] for piece in dict.fromkeys(pieces)]
    known = set(learnt)
    letters = [number for number, kind in enumerate(kinds) if kind == NORMAL and number not in known]
    places = {number: -float(place) for place, number in enumerate([*learnt, *letters])}
    return [places.get(number, 0.0) for number in range(len(kinds))]


def normalizes_blanks_alone(content: dict[str, Any]) -> bool:
    """Return whether a tokenizer writes blanks as `BLANK`, and does no more to a text before it merges."""
    normalizer, splitter = content["normalizer"], content["pre_tokenizer"]
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
    prepends = {"type": "Prepend", "prepend": BLANK}
    # Gemma's splits at blanks that the normaliser has left none of.
    at_blanks = {"type": "Split", "pattern": {"String": " "}}
    splits_nothing = splitter is None or at_blanks.items() <= splitter.items()
    if splits_nothing and replaces in steps:
        return all(step in (replaces, prepends) for step in steps)
    if splitter is None:
        return False
    is_metaspace = splitter["type"] == "Metaspace" and splitter["replacement"] == BLANK
    return is_metaspace and not splitter.get("split", True) and not steps


def begins_with_blank(content: dict[str, Any]) -> bool:
    """Return whether a tokenizer puts a blank before a text."""
    normalizer, splitter = content["normalizer"], content["pre_tokenizer"]
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    if splitter is not None and "prepend_scheme" in splitter:
        return bool(splitter["prepend_scheme"] != "never")
    return any(step["type"] == "Prepend" for step in steps)
