"""The bytes of a text that a token stands for at most: a prompt above that for every token cannot fit."""

from collections.abc import Callable

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_peft.models.tiny import tiny_tokenizer
from lightning_peft.serving.prompt import most_bytes_a_token


def byte_level(change: Callable[[Tokenizer], object] = lambda tokenizer: None) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    change(tokenizer.backend_tokenizer)
    return tokenizer


def fallback(*missing: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of words of Llama 2's kind, with a token for each byte but some."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256) if byte not in missing), "▁", "a", "▁a"]
    vocabulary = {name: number for number, name in enumerate(names)}
    model = models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def words() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "ab": 1, "cd": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def nfc(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.NFC()


def strip(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])


def join_blanks(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Replace(Regex(" +"), " ")


def remove_blanks(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), tokenizer.pre_tokenizer])


def isolate_blanks(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "isolated"), tokenizer.pre_tokenizer])


def take_blanks(tokenizer: Tokenizer) -> None:
    tokenizer.add_tokens([AddedToken("<|tool|>", rstrip=True)])


TEXTS = ["", "a a", " " * 99, "\n\t \r\n" * 20, "é😀\0", "\u1fbe\u0308\u0301" * 30, "\u212a" * 40, "<|im_start|>" * 20]


@pytest.mark.parametrize(
    ("tokenizer", "most"),
    [
        (byte_level(), len("<|endoftext|>")),
        (byte_level(nfc), 4 * len("<|endoftext|>")),
        (byte_level(isolate_blanks), len("<|endoftext|>")),
        (fallback(), len("<0x00>")),
    ],
    ids=["bytes", "nfc", "split", "fallback"],
)
def test_no_text_has_fewer_tokens(tokenizer: PreTrainedTokenizerFast, most: int) -> None:
    assert most_bytes_a_token(tokenizer) == most
    for text in TEXTS:
        assert len(text.encode()) <= most * len(tokenizer(text)["input_ids"])


@pytest.mark.parametrize(
    "tokenizer",
    [
        words(),
        fallback(0x41),
        *map(byte_level, (strip, join_blanks, remove_blanks, take_blanks)),
    ],
    ids=["words", "a byte without a token", "strip", "join", "remove", "take"],
)
def test_there_is_no_bound_where_some_of_a_text_is_dropped(tokenizer: PreTrainedTokenizerFast) -> None:
    assert most_bytes_a_token(tokenizer) is None


@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [
        (words(), "ab" + " " * 500 + "cd"),
        (fallback(0x41), "A" * 500),
        (byte_level(strip), " " * 500),
        (byte_level(join_blanks), " " * 500),
        (byte_level(remove_blanks), " " * 500),
        (byte_level(take_blanks), "<|tool|>" + " " * 500),
    ],
    ids=["words", "a byte without a token", "strip", "join", "remove", "take"],
)
def test_such_a_text_is_longer_than_its_tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    longest = max(len(token.encode()) for token in tokenizer.get_vocab())
    assert len(text.encode()) > longest * len(tokenizer(text)["input_ids"])
