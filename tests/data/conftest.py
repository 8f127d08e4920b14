"""A tokenizer small enough to write labels by hand: words of the corpus are one token each."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from chatml import CHATML
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

WORDS = "user assistant system Hi Hello there Paris France Be brief Thanks Welcome one two three four User Assistant"
SPECIAL = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "[INST]",
    "[/INST]",
]


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Return the function `make_tokenizer(chat_template, bos, eos, ...)`; byte-level BPE."""

    def make(
        chat_template: str | None = None,
        bos: str | None = "<s>",
        eos: str | None = "</s>",
        adds_bos: bool = False,
        trim_offsets: bool = False,
        normalizer: normalizers.Normalizer | None = None,
    ) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        if normalizer is not None:
            tokenizer.normalizer = normalizer
        trainer = trainers.BpeTrainer(
            vocab_size=600, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
        tokenizer.train_from_iterator([word + " " + word for word in WORDS.split()] * 3 + ["\n\n"] * 9, trainer)
        if adds_bos:
            bos_id = tokenizer.token_to_id(bos)
            tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bos_id)])
        elif trim_offsets:
            tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, additional_special_tokens=SPECIAL
        )
        fast.chat_template = chat_template
        return fast

    return make


@pytest.fixture(scope="session")
def chatml(make_tokenizer) -> PreTrainedTokenizerFast:
    return make_tokenizer(CHATML, bos="<|im_start|>", eos="<|im_end|>")


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., str]:
    """Return the function `write_jsonl(rows, name)`, which gives the path; a string is written as it is."""

    def write(rows: list[dict | str], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(path)

    return write
