"""Byte-level tokenizers written to a GGUF file and read back: the same tokens, whichever way a text is split."""

from pathlib import Path

import pytest
from families import small_model
from gguf import GGUFWriter
from pieces import ALSO, TEXTS, bytes_tokenizer

from lightning_peft.data.layout import PromptLayout
from lightning_peft.models.gguf import GGUFFile
from lightning_peft.models.gguf_vocabulary import PRE_TOKENIZERS
from lightning_peft.models.loading import load_tokenizer
from lightning_peft.models.source import ModelConfig
from lightning_peft.serving.gguf_model import write_gguf_model


@pytest.mark.parametrize("split", PRE_TOKENIZERS)
def test_tokenizer_read_back_gives_the_same_tokens(split: str, tmp_path: Path) -> None:
    tokenizer, path = bytes_tokenizer(split), tmp_path / "m.gguf"
    model = small_model("smollm3", vocab_size=len(tokenizer))
    write_gguf_model(model, tokenizer, PromptLayout(stop_token_ids=[1]), path, "fp32", None, "m")
    assert GGUFFile(path).fields["tokenizer.ggml.pre"] == split
    read = load_tokenizer(ModelConfig("hf", str(path)))
    for text in (*TEXTS, *ALSO):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == 0 and read(text)["input_ids"] == ids
        assert read.decode(ids) == tokenizer.decode(ids)
        assert read.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("split", PRE_TOKENIZERS)
def test_a_file_that_does_not_say_so_begins_texts_as_llama_cpp_does(
    split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of Llama 3 leave it out, and llama.cpp knows by the split that its texts begin with a token."""
    tokenizer, path = bytes_tokenizer(split), tmp_path / "m.gguf"
    monkeypatch.setattr(GGUFWriter, "add_add_bos_token", lambda writer, value: None)
    model = small_model("llama", vocab_size=len(tokenizer))
    write_gguf_model(model, tokenizer, PromptLayout(stop_token_ids=[1]), path, "fp32", None, "m")
    assert (load_tokenizer(ModelConfig("hf", str(path)))(TEXTS[0])["input_ids"][0] == 0) is (split == "llama-bpe")
