"""The adapter files for llama.cpp: bit for bit what its own converter writes, and read back."""

import json
from pathlib import Path

import pytest
import torch
from adapter_models import adapted, llama, logits, perturb
from families import small_model
from llama_cpp_fixture import FIXTURE, content, model_and_pairs

from lightning_peft.adapters.inject import inject_adapters
from lightning_peft.adapters.lora import LoRAConfig
from lightning_peft.models.gguf_families import FAMILIES
from lightning_peft.models.gguf_names import GGUFNames
from lightning_peft.serving.gguf_lora import check_pairs, read_gguf_lora, write_gguf_lora
from lightning_peft.serving.plain import inject_pairs, plain_pairs


@pytest.mark.parametrize("family", FAMILIES)
def test_file_is_what_llama_cpp_converts_to(family: str, tmp_path: Path) -> None:
    model, pairs = model_and_pairs(family)
    path = tmp_path / "adapter.gguf"

    write_gguf_lora(pairs, model, path, "run")

    assert content(path) == json.loads(FIXTURE.read_text())[family]
    read = read_gguf_lora(path, model, list(pairs))
    assert all(torch.equal(a, b) for name in pairs for a, b in zip(read[name], pairs[name], strict=True))


def test_another_tensor_in_the_file_is_an_error(tmp_path: Path) -> None:
    model, pairs = model_and_pairs("llama")
    write_gguf_lora(pairs, model, tmp_path / "adapter.gguf", "run")
    with pytest.raises(ValueError, match="holds 28 tensors, not the 26 of 13 layers"):
        read_gguf_lora(tmp_path / "adapter.gguf", model, list(pairs)[1:])


def test_unknown_family_is_named() -> None:
    with pytest.raises(ValueError, match="llama.cpp's layout of gpt_neox is not known here; these are: llama"):
        GGUFNames(small_model("gpt_neox").config)


def test_tied_head_and_embedding_are_refused() -> None:
    for target, tied, says in (("embed_tokens", False, "is an embedding"), ("lm_head", True, "shares its weight")):
        model = llama(tie_word_embeddings=tied)
        inject_adapters(model, LoRAConfig(rank=2, target_modules=[target], untie_embeddings=tied))
        with pytest.raises(ValueError, match=f"{target} {says}"):
            check_pairs(plain_pairs(model), model, tied)


def test_pairs_read_back_give_the_same_logits(tmp_path: Path) -> None:
    model = perturb(adapted("lora"))
    write_gguf_lora(plain_pairs(model), model, tmp_path / "adapter.gguf", "run")
    fresh = llama()
    inject_pairs(fresh, read_gguf_lora(tmp_path / "adapter.gguf", fresh, list(plain_pairs(model))))
    torch.testing.assert_close(logits(fresh.eval()), logits(model), rtol=1e-5, atol=1e-5)
