"""Tokenizers learnt here: of Llama 2's kind, SentencePiece's BPE with a token for each byte, and byte-level BPE."""

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lightning_peft.models.gguf_vocabulary import COMPOSED, PRE_TOKENIZERS, WHOLE_WORDS

TEXTS = (
    "How many singers are there? List the names of all cities, the largest first.",
    "select count(*) from singer where age > 30 order by name desc limit 1",
    "The quick brown fox jumps over the lazy dog; the lazy dog sleeps.",
)
ALSO = (
    "don't WE'LL 1234 12.5\n\n\tdef f(x):\n\t\treturn x  ",
    "<think>Grüße 漢字</think> 🚀 e\N{COMBINING ACUTE ACCENT}",
    "<s>camelCase HTTPServer<s>",
)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


def pieces_tokenizer(size: int = 400) -> PreTrainedTokenizerFast:
    """Return a tokenizer of `size` tokens."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    content = Tokenizer.from_str(backend.to_str())
    # Bytes are tokens of the model, none that a text could name.
    plain = Tokenizer(models.BPE(
        content.get_vocab(with_added_tokens=False), merges_of(content), unk_token="<unk>", fuse_unk=True,
        byte_fallback=True,
    ))  # fmt: skip
    plain.normalizer, plain.decoder = backend.normalizer, backend.decoder
    plain.add_special_tokens([AddedToken(token, normalized=False) for token in special[:3]])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def merges_of(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]


def bytes_tokenizer(split: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of 400 tokens that splits this way, with a first token and a token that is not special."""
    backend = Tokenizer(models.BPE(ignore_merges=split in WHOLE_WORDS))
    backend.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[split]())
    backend.decoder = decoders.ByteLevel()
    if split in COMPOSED:
        backend.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([*TEXTS, *ALSO], trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    return tokenizer
