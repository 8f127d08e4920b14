"""The text of an answer as its tokens come is that of all of them at once."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_peft.inference.answer_text import UNFINISHED, AnswerText
from lightning_peft.models.tiny import tiny_tokenizer

TEXTS = (
    "plain words, " * 30,
    "naïve café — 日本語 🎉🎉 " * 12,
    "  two  blanks\n    and an indent\n" * 9,
    "x" * 63 + "é" * 70,
    "日本語" * 40,
)


def blanks_by_metaspace() -> PreTrainedTokenizerFast:
    """Return a tokenizer as Llama 2 has it: blanks are of words, the first one falls away, other bytes stand alone."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz,.", "\n"]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", clean_up_tokenization_spaces=False)


def words_by_pieces() -> PreTrainedTokenizerFast:
    words = {word: place for place, word in enumerate(["<unk>", "x", "##x", "plain", "##s"])}
    tokenizer = Tokenizer(models.WordPiece(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("make", [tiny_tokenizer, blanks_by_metaspace, words_by_pieces])
def test_text_grows_to_that_of_all_tokens(make, text: str) -> None:
    tokenizer = make()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer = AnswerText(tokenizer)
    for place, token in enumerate(ids):
        answer.add(token)
        whole = tokenizer.decode(ids[: place + 1], skip_special_tokens=True)
        # Of bytes that are cut in a character, a fallback leaves none as it is.
        assert answer.whole == whole if answer.is_ready else whole.endswith(UNFINISHED)


@pytest.mark.parametrize("count", range(3, 16))
def test_a_text_goes_on_with_characters_that_are_bytes(count: int) -> None:
    """The last tokens of a prompt may begin within a character; so many of them are looked at that they do not."""
    tokenizer = blanks_by_metaspace()
    ids = tokenizer("日本語" * 6, add_special_tokens=False)["input_ids"]
    answer = AnswerText(tokenizer, ids[: 3 * count + 1])
    for token in ids[3 * count + 1 :]:
        answer.add(token)
    assert answer.whole == ("日本語" * 6)[count:]


def test_few_tokens_are_decoded_at_once() -> None:
    """The work for a token does not grow with the answer."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer("words " * 200, add_special_tokens=False)["input_ids"]
    counts: list[int] = []
    decode = tokenizer.decode
    tokenizer.decode = lambda tokens, **options: counts.append(len(tokens)) or decode(tokens, **options)
    answer = AnswerText(tokenizer)
    for token in ids:
        answer.add(token)
    assert answer.whole == "words " * 200 and max(counts) == 64 and len(counts) < 1.1 * len(ids)


def test_a_text_goes_on_with_the_blank_that_a_tokenizer_drops_at_its_beginning() -> None:
    """Of Llama 2's kind: a blank is part of the word behind it, and the first of a text is dropped."""
    vocabulary = {"<unk>": 0, "▁": 1, "a": 2, "▁a": 3, "<0xC3>": 4, "<0xA9>": 5}
    backend = Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    for before, tokens, expected in (([], [3, 3], "a a"), ([3], [3, 2], " aa"), ([2] * 20, [3], " a")):
        answer = AnswerText(tokenizer, before)
        for token in tokens:
            answer.add(token)
        assert answer.whole == expected
    answer = AnswerText(tokenizer, [3, 4])  # the prompt ended within a character
    for token in (5, 3):
        answer.add(token)
    assert answer.whole.endswith(" a")
