"""Adapter folders: HF PEFT reads ours, we read HF's, and bad folders get one line."""

import contextlib
import dataclasses
import json
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_peft.adapters.base import AdapterConfig
from lightning_peft.adapters.inject import adapters, inject_adapters
from lightning_peft.adapters.lora import LoRAConfig
from lightning_peft.checkpoint.atomic import SaveError
from lightning_peft.checkpoint.lineage import Lineage
from lightning_peft.checkpoint.peft_format import (
    AdapterFileError,
    adapter_config_from_peft,
    file_tensors,
    load_adapter,
    save_adapter,
)
from lightning_peft.models.tiny import tiny_model

# transformers 5.23 deprecates what peft 0.21 calls.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

# Both sides compute x A^T B^T in another order; logits are of order 1 to 10.
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 2e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 6e-2}}


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=320, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1)
    return GPT2LMHeadModel(config).eval()


def randomize(model: nn.Module, seed: int = 1) -> None:
    """Move adapters far from their start, so that a tensor left out shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in file_tensors(model).values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))


def logits(model: nn.Module) -> Tensor:
    input_ids = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model(input_ids=input_ids).logits


def adapted(config: AdapterConfig, model: nn.Module | None = None) -> nn.Module:
    model = tiny_model().eval() if model is None else model
    inject_adapters(model, config)
    randomize(model)
    return model


def reload(folder: Path, model: nn.Module | None = None) -> nn.Module:
    model = tiny_model().eval() if model is None else model
    inject_adapters(model, adapter_config_from_peft(folder))
    load_adapter(model, folder)
    return model.eval()


CONFIGS = {
    "lora": LoRAConfig(rank=4, alpha=6),
    "rslora": LoRAConfig(rank=4, alpha=6, rank_stabilized=True),
    "dropout": LoRAConfig(rank=2, dropout=0.3),
    "some_layers": LoRAConfig(rank=4, target_modules=["q_proj", "up_proj"], layers="1"),
    "one_full_name": LoRAConfig(rank=4, target_modules=["model.layers.0.mlp.up_proj"]),
    "rank_pattern": LoRAConfig(rank=4, rank_pattern={"layers.1.mlp.*": 8}, alpha_pattern={"q_proj": 5.0}),
    "rslora_patterns": LoRAConfig(rank=4, alpha=6, rank_pattern={"up_proj": 7}, rank_stabilized=True),
    "tapered": LoRAConfig(rank=8, rank_last=2),
    "embedding": LoRAConfig(rank=4, target_modules=["embed_tokens", "q_proj"]),
    "head": LoRAConfig(rank=4, target_modules=["lm_head", "v_proj"]),
    "trained_head_and_norms": LoRAConfig(rank=4, trainable_modules=["lm_head", "input_layernorm", "model.norm"]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_hf_peft_reads_our_folder(name: str, tmp_path: Path) -> None:
    model = adapted(CONFIGS[name]).eval()
    save_adapter(model, CONFIGS[name], tmp_path / "adapter", "tiny")

    theirs = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "adapter")).eval()

    torch.testing.assert_close(logits(model), logits(theirs), **TOLERANCE[torch.float32])
    assert not torch.allclose(logits(model), logits(tiny_model().eval()), atol=1e-2)


@pytest.mark.parametrize("name", CONFIGS)
def test_our_folder_comes_back_bit_equal(name: str, tmp_path: Path) -> None:
    model = adapted(CONFIGS[name]).eval()
    save_adapter(model, CONFIGS[name], tmp_path / "adapter", "tiny")

    again = reload(tmp_path / "adapter")

    assert torch.equal(logits(model), logits(again))


def test_bf16_base_agrees_with_hf_peft(tmp_path: Path) -> None:
    config = LoRAConfig(rank=4)
    model = adapted(config, tiny_model().bfloat16().eval())
    save_adapter(model, config, tmp_path / "adapter", "tiny")

    theirs = PeftModel.from_pretrained(tiny_model().bfloat16(), str(tmp_path / "adapter")).eval()

    assert {p.dtype for n, p in theirs.named_parameters() if "lora_" in n} == {torch.float32}
    torch.testing.assert_close(logits(model), logits(theirs), **TOLERANCE[torch.bfloat16])


def test_conv1d_both_ways(tmp_path: Path) -> None:
    config = LoRAConfig(rank=4)
    model = adapted(config, gpt2())
    save_adapter(model, config, tmp_path / "adapter", "gpt2")

    theirs = PeftModel.from_pretrained(gpt2(), str(tmp_path / "adapter")).eval()

    torch.testing.assert_close(logits(model), logits(theirs), **TOLERANCE[torch.float32])
    assert torch.equal(logits(model), logits(reload(tmp_path / "adapter", gpt2())))


def test_trained_tied_embedding_keeps_both_ends_in_hf_peft(tmp_path: Path) -> None:
    config = LoRAConfig(rank=4, trainable_modules=["embed_tokens", "lm_head"])
    model = adapted(config, tiny_model(tied=True).eval())
    save_adapter(model, config, tmp_path / "adapter", "tiny")

    with pytest.warns(UserWarning, match="tie_word_embeddings|tied"):
        theirs = PeftModel.from_pretrained(tiny_model(tied=True), str(tmp_path / "adapter")).eval()

    torch.testing.assert_close(logits(model), logits(theirs), **TOLERANCE[torch.float32])
    assert torch.equal(logits(model), logits(reload(tmp_path / "adapter", tiny_model(tied=True).eval())))


HF_CONFIGS = {
    "lora": LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"]),
    "all_linear": LoraConfig(r=4, target_modules="all-linear"),
    "biases_without_any": LoraConfig(r=4, target_modules=["q_proj"], bias="all"),
    "own_biases_without_any": LoraConfig(r=4, target_modules=["q_proj"], bias="lora_only"),
    "regex": LoraConfig(r=4, target_modules=r".*layers\.1\.(mlp|self_attn)\.(up|q)_proj"),
    "layers_to_transform": LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers"),
    "exclude": LoraConfig(r=4, target_modules=["q_proj", "k_proj"], exclude_modules=["layers.0.self_attn.k_proj"]),
    "rslora": LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], use_rslora=True, rank_pattern={"1.*q_proj": 9}),
    "patterns": LoraConfig(
        r=4,
        target_modules=["q_proj", "k_proj", "up_proj"],
        rank_pattern={"layers.0.self_attn.q_proj": 8, "^model.layers.1.*proj": 3},
        alpha_pattern={"q_proj": 20, "layers.1.mlp.up_proj": 1},
    ),
    "modules_to_save": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "input_layernorm"]),
    "container_to_save": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["mlp"]),
}


def save_hf(config: LoraConfig, folder: Path, model: nn.Module) -> nn.Module:
    theirs = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(str(folder))
    return theirs


@pytest.mark.parametrize("name", HF_CONFIGS)
def test_we_read_hf_peft(name: str, tmp_path: Path) -> None:
    theirs = save_hf(HF_CONFIGS[name], tmp_path, tiny_model())

    ours = reload(tmp_path)

    torch.testing.assert_close(logits(ours), logits(theirs), **TOLERANCE[torch.float32])


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_we_read_hf_embedding_adapter_with_its_base_embedding(tmp_path: Path) -> None:
    theirs = save_hf(LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]), tmp_path, tiny_model())
    assert any(
        name.endswith("embed_tokens.base_layer.weight") for name in load_file(tmp_path / "adapter_model.safetensors")
    )

    ours = reload(tmp_path)

    torch.testing.assert_close(logits(ours), logits(theirs), **TOLERANCE[torch.float32])


def test_we_read_hf_conv1d(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True)
    theirs = save_hf(config, tmp_path, gpt2())

    torch.testing.assert_close(logits(reload(tmp_path, gpt2())), logits(theirs), **TOLERANCE[torch.float32])


def test_we_read_hf_trained_biases(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, bias="all")
    theirs = save_hf(config, tmp_path, gpt2())

    torch.testing.assert_close(logits(reload(tmp_path, gpt2())), logits(theirs), **TOLERANCE[torch.float32])


def words(folder: Path) -> dict[str, object]:
    return json.loads((folder / "adapter_config.json").read_text())


def test_config_words_are_sorted_with_indent_two(tmp_path: Path) -> None:
    save_adapter(adapted(CONFIGS["lora"]), CONFIGS["lora"], tmp_path / "a", "some/base")
    text = (tmp_path / "a" / "adapter_config.json").read_text()

    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
    assert words(tmp_path / "a")["target_modules"] == [
        *("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    ]
    assert words(tmp_path / "a") | {"r": 4, "lora_alpha": 6, "base_model_name_or_path": "some/base"} == words(
        tmp_path / "a"
    )


def test_layer_selection_is_written_as_full_names(tmp_path: Path) -> None:
    save_adapter(adapted(CONFIGS["some_layers"]), CONFIGS["some_layers"], tmp_path / "a")

    assert words(tmp_path / "a")["target_modules"] == ["model.layers.1.mlp.up_proj", "model.layers.1.self_attn.q_proj"]


def test_config_comes_back_from_our_words(tmp_path: Path) -> None:
    config = CONFIGS["rank_pattern"]
    model = adapted(config)
    save_adapter(model, config, tmp_path / "a")

    read = adapter_config_from_peft(tmp_path / "a")

    assert read.target_modules == sorted(name for name, _ in adapters(model))
    assert (read.method, read.rank, read.alpha) == ("lora", 4, 8)
    assert read.rank_pattern == {f"model.layers.1.mlp.{part}_proj": 8 for part in ("down", "gate", "up")}


def test_unknown_word_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_adapter(adapted(CONFIGS["lora"]), CONFIGS["lora"], tmp_path / "a")
    edit(tmp_path / "a", brand_new_word=3)

    adapter_config_from_peft(tmp_path / "a")

    assert [r.message for r in caplog.records if "brand_new_word" in r.message] == [
        f"{tmp_path}/a/adapter_config.json: ignored, not known: brand_new_word"
    ]


def test_other_scaling_than_in_the_file_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_adapter(adapted(CONFIGS["lora"]), CONFIGS["lora"], tmp_path / "a")
    model = adapted(dataclasses.replace(CONFIGS["lora"], alpha=12))

    load_adapter(model, tmp_path / "a")

    assert "was scaled by 1.5, here it is by 3" in caplog.text


def edit(folder: Path, **changes: object) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(words(folder) | changes))


def drop(folder: Path, name: str) -> None:
    (folder / name).unlink()


def change_tensors(folder: Path, ending: str, change: object) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    (name,) = [n for n in tensors if n.endswith(ending)]
    tensor = tensors.pop(name)
    if callable(change):
        tensors |= change(name, tensor)
    save_file(tensors, path)


def cut(folder: Path, size: int) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:size])


DAMAGE = {
    "no folder": (lambda f: f.rename(f.with_name("gone")), "no such adapter folder"),
    "no config": (lambda f: drop(f, "adapter_config.json"), "not an adapter folder, it has no adapter_config.json"),
    "no weights": (lambda f: drop(f, "adapter_model.safetensors"), "has no adapter_model.safetensors"),
    "config cut": (lambda f: (f / "adapter_config.json").write_text('{"r": 4,'), "not valid JSON"),
    "config empty": (lambda f: (f / "adapter_config.json").write_text("{}"), "names no peft_type"),
    "weights cut": (lambda f: cut(f, 5000), "truncated or damaged"),
    "weights empty": (lambda f: cut(f, 0), "truncated or damaged"),
    "weights garbage": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\xff" * 99), "truncated or damaged"),
    "unknown type": (lambda f: edit(f, peft_type="OFT"), "peft_type=OFT is not supported; these are: .*LORA"),
    "aLoRA": (lambda f: edit(f, alora_invocation_tokens=[3]), r"uses alora_invocation_tokens=\[3\], a feature"),
    "lora_ga": (lambda f: edit(f, init_lora_weights="lora_ga"), "init_lora_weights='lora_ga' changed the base"),
    "alpha in words": (lambda f: edit(f, lora_alpha="16"), "adapter_config.json: lora_alpha='16' must be a number"),
    "alpha null": (lambda f: edit(f, lora_alpha=None), "lora_alpha=None must be a number"),
    "dropout in words": (lambda f: edit(f, lora_dropout="0.1"), "lora_dropout='0.1' must be a number"),
    "pattern of words": (lambda f: edit(f, alpha_pattern={"q_proj": "3"}), r"alpha_pattern\['q_proj'\]='3' must be"),
    "pattern no object": (lambda f: edit(f, rank_pattern=[4]), r"rank_pattern=\[4\] must be an object of names"),
    "pattern no regex": (lambda f: edit(f, alpha_pattern={"(q": 3}), r"alpha_pattern names '\(q', not a regular"),
    "alpha zero": (
        lambda f: edit(f, alpha_pattern={"q_proj": 0}),
        r"q_proj.\]=0 must be above 0: give",
    ),
    "alpha below zero": (lambda f: edit(f, lora_alpha=-8), "lora_alpha=-8 must be above 0: give the factors the sign"),
    "bias unknown": (lambda f: edit(f, bias="sum"), "bias='sum' must be one of none, all, lora_only"),
    "missing tensor": (
        lambda f: change_tensors(f, "1.mlp.up_proj.lora_B.weight", None),
        "lacks .*1.mlp.up_proj.lora_B",
    ),
    "other tensor": (
        lambda f: change_tensors(f, "1.mlp.up_proj.lora_B.weight", lambda n, t: {n: t, n + "x": t.clone()}),
        "has, and this model does not, .*lora_B.weightx",
    ),
    "other shape": (
        lambda f: change_tensors(f, "1.mlp.up_proj.lora_B.weight", lambda n, t: {n: t[:-1].clone()}),
        r"lora_B.weight has shape \(127, 4\), this model needs \(128, 4\)",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_bad_folder_gets_one_line(name: str, tmp_path: Path) -> None:
    damage, message = DAMAGE[name]
    folder = tmp_path / "adapter"
    save_adapter(adapted(CONFIGS["lora"]), CONFIGS["lora"], folder)
    damage(folder)

    with pytest.raises(AdapterFileError, match=message) as caught:
        reload(folder)

    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_a_state_dict_with_the_name_of_the_adapter_in_it_is_read(tmp_path: Path) -> None:
    model = adapted(CONFIGS["lora"])
    save_adapter(model, CONFIGS["lora"], tmp_path / "a")
    path = tmp_path / "a/adapter_model.safetensors"
    named = {name.replace(".weight", ".default.weight"): tensor for name, tensor in load_file(path).items()}
    save_file(named, path)
    assert torch.equal(logits(reload(tmp_path / "a")), logits(model))


def test_pickle_is_refused_by_name(tmp_path: Path) -> None:
    save_adapter(adapted(CONFIGS["lora"]), CONFIGS["lora"], tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "a" / "adapter_model.bin")

    with pytest.raises(AdapterFileError, match="adapter_model.bin is a pickle, which may run code"):
        reload(tmp_path / "a")


def test_flipped_bit_is_found_through_the_lineage(tmp_path: Path) -> None:
    save_adapter(adapted(CONFIGS["lora"]), CONFIGS["lora"], tmp_path / "a", lineage=Lineage("f" * 64, "tiny"))
    path = tmp_path / "a" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)

    with pytest.raises(AdapterFileError, match="damaged, it is not the file that lineage.json describes"):
        reload(tmp_path / "a")


def test_rank_of_another_adapter_is_named(tmp_path: Path) -> None:
    save_adapter(adapted(CONFIGS["lora"]), CONFIGS["lora"], tmp_path / "a")
    model = adapted(LoRAConfig(rank=8))

    with pytest.raises(AdapterFileError, match=r"has shape \(4, 64\), this model needs \(8, 64\)"):
        load_adapter(model, tmp_path / "a")


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let writing beyond `size` bytes fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_leaves_the_previous_folder(tmp_path: Path) -> None:
    model = adapted(CONFIGS["lora"]).eval()
    save_adapter(model, CONFIGS["lora"], tmp_path / "adapter")

    with largest_file(20_000), pytest.raises(SaveError, match="adapter: cannot be saved .*File too large") as caught:
        save_adapter(adapted(LoRAConfig(rank=8)), LoRAConfig(rank=8), tmp_path / "adapter")

    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    assert torch.equal(logits(model), logits(reload(tmp_path / "adapter")))


def test_save_replaces_a_folder_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    save_adapter(adapted(LoRAConfig(rank=8)), LoRAConfig(rank=8), tmp_path / "adapter", lineage=Lineage("f", "tiny"))
    model = adapted(CONFIGS["lora"]).eval()
    save_adapter(model, CONFIGS["lora"], tmp_path / "adapter")

    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert torch.equal(logits(model), logits(reload(tmp_path / "adapter")))
