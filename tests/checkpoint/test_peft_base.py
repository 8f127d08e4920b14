"""Changes of the base beside LoRA in HF PEFT's folders: rows of embeddings (trainable_token_indices), lora_bias."""

import json

import pytest
import torch
from families import small_model
from peft import LoraConfig, PeftModel, get_peft_model
from peft_adapters import save_changed
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lightning_peft.adapters.base import NotMergeableError
from lightning_peft.adapters.inject import disable_adapters, inject_adapters
from lightning_peft.adapters.merge import merge_adapters
from lightning_peft.checkpoint.peft_format import adapter_config_from_peft, load_adapter, save_adapter
from lightning_peft.checkpoint.peft_words import AdapterFileError
from lightning_peft.command_configs.of_adapters import MergeCommandConfig
from lightning_peft.commands.merge import merge
from lightning_peft.models.source import ModelConfig
from lightning_peft.models.tiny import tiny_tokenizer
from lightning_peft.models.twin import copy_around_same_tensors

IDS = torch.arange(3, 43)[None]
WEIGHTS = "adapter_model.safetensors"
ROWS = {"trainable_token_indices": [5, 9, 30]}
FORMS = {
    "rows": ({}, ROWS),
    "rows_of_tied_ends": ({"tie_word_embeddings": True}, ROWS),
    "rows_of_both_tied_ends": (
        {"tie_word_embeddings": True},
        {"trainable_token_indices": {"embed_tokens": [5, 9], "lm_head": [7]}},
    ),
    "rows_of_the_head": ({"tie_word_embeddings": True}, {"trainable_token_indices": {"lm_head": [5]}}),
    "rows_of_both": ({}, {"trainable_token_indices": {"model.embed_tokens": [5, 9], "lm_head": [7]}}),
    "rows_and_norms": ({}, {**ROWS, "modules_to_save": ["norm"]}),
    "lora_bias": ({"attention_bias": True}, {"lora_bias": True}),
    "lora_bias_of_trained_biases": ({"attention_bias": True}, {"lora_bias": True, "bias": "lora_only"}),
    "lora_bias_without_biases": ({}, {"lora_bias": True, "use_rslora": True}),
}
"""Options of the model, and words of HF PEFT."""
NEW_BIASES = "lora_bias_without_biases"


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits.float()


def saved_by_peft(form, folder, family="llama"):
    """Save an adapter that changes as much as it can; return the base's folder, and the logits."""
    options, words = FORMS[form]
    small_model(family, vocab_size=320, **options).save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **words)
    return logits(save_changed(folder / "base", config, folder / "theirs"))


def read_here(folder, name="theirs"):
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    config = adapter_config_from_peft(folder / name)
    inject_adapters(model, config)
    load_adapter(model, folder / name)
    return model, config


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMS)
def test_the_logits_are_peft_s_here_and_from_a_folder_of_ours(form, tmp_path):
    expected = saved_by_peft(form, tmp_path)
    model, config = read_here(tmp_path)
    tolerance = {"rtol": 0, "atol": 1e-5 * float(expected.abs().max())}  # fp32, s b' added to b instead of behind B
    torch.testing.assert_close(logits(model), expected, **tolerance)
    with disable_adapters(model):
        assert (logits(model) - logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))).abs().max() > 0.1

    # A run that begins with it saves it: nothing is lost, though none of it trains.
    save_adapter(model, config, tmp_path / "ours", str(tmp_path / "base"))
    torch.testing.assert_close(logits(read_here(tmp_path, "ours")[0]), expected, **tolerance)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "ours"))
    torch.testing.assert_close(logits(theirs), expected, **tolerance)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["rows_of_both", "rows_of_tied_ends", "lora_bias"])
def test_a_model_around_the_same_tensors_stays_as_it_was(form, tmp_path):
    saved_by_peft(form, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    teacher = copy_around_same_tensors(model)
    before = logits(teacher)
    inject_adapters(model, adapter_config_from_peft(tmp_path / "theirs"))
    load_adapter(model, tmp_path / "theirs")
    assert torch.equal(logits(teacher), before) and not torch.equal(logits(model), before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMS)
def test_the_merged_model_is_peft_s(form, tmp_path):
    expected = saved_by_peft(form, tmp_path)
    base = ModelConfig("hf", str(tmp_path / "base"))
    merge(MergeCommandConfig(adapter_path=str(tmp_path / "theirs"), model=base, output=str(tmp_path / "merged")))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["rows", "lora_bias", NEW_BIASES])
def test_a_base_of_more_digits_is_not_rounded_to_those_of_the_run(form, tmp_path):
    expected = saved_by_peft(form, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    inject_adapters(model, adapter_config_from_peft(tmp_path / "theirs"))
    load_adapter(model, tmp_path / "theirs")
    merged = merge_adapters(model, original=AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore")
def test_new_biases_are_the_architecture_s_own(tmp_path):
    """Llama's option adds them to four layers of a block, and the adapter has those of two."""
    saved_by_peft(NEW_BIASES, tmp_path)
    merged = merge_adapters(read_here(tmp_path)[0])
    assert merged.config.attention_bias and not merged.config.mlp_bias
    biases = {name: value for name, value in merged.named_parameters() if name.endswith(".bias")}
    assert {name.split(".")[-2] for name in biases} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert all(value.any() == ("q_proj" in name or "v_proj" in name) for name, value in biases.items())


@pytest.mark.filterwarnings("ignore")
def test_a_bias_that_the_architecture_has_not_is_not_merged(tmp_path):
    saved_by_peft(NEW_BIASES, tmp_path, "mistral")
    with pytest.raises(NotMergeableError, match=r"layers.0.self_attn.q_proj.bias, and MistralForCausalLM has no such"):
        merge_adapters(read_here(tmp_path)[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["rows", "lora_bias"])
def test_what_trains_takes_the_change_as_its_start(form, tmp_path):
    expected = saved_by_peft(form, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = adapter_config_from_peft(tmp_path / "theirs")
    if form == "rows":
        config.trainable_modules = ["embed_tokens"]
    else:
        config.bias = type(config.bias).lora_only
    inject_adapters(model, config)
    load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    save_adapter(model, config, tmp_path / "ours", str(tmp_path / "base"))
    assert "lora_bias" not in json.loads((tmp_path / "ours/adapter_config.json").read_text())
    torch.testing.assert_close(logits(read_here(tmp_path, "ours")[0]), expected, rtol=0, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("indices", [[5, 9], [5, 9, 4000], [5, 9, -1]], ids=["few", "beyond", "negative"])
def test_rows_that_do_not_fit_are_one_sentence(indices, tmp_path):
    saved_by_peft("rows", tmp_path)
    path = tmp_path / "theirs/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "trainable_token_indices": indices}))
    with pytest.raises(AdapterFileError, match=r"trainable_token_indices: model.embed_tokens has \(3, 64\) values"):
        read_here(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_a_bias_of_another_layer_is_one_sentence(tmp_path):
    saved_by_peft("lora_bias", tmp_path)
    tensors = load_file(tmp_path / "theirs" / WEIGHTS)
    name = next(name for name in tensors if name.endswith("lora_B.bias"))
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, tmp_path / "theirs" / WEIGHTS)
    with pytest.raises(AdapterFileError, match=r"lora_bias: model.layers.0.self_attn.\w_proj has a bias of \(\d+,\)"):
        read_here(tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "part"), [("llama", "embed_tokens"), ("llama", "norm"), ("glm4_moe", "e_score_correction_bias")]
)
def test_a_base_of_several_dtypes_keeps_each(family, part, tmp_path):
    base = small_model(family, vocab_size=320).bfloat16()
    for name, tensor in [*base.named_parameters(), *base.named_buffers()]:
        if part in name:
            tensor.data = tensor.data.float()
    base.config.dtype = torch.bfloat16
    base.save_pretrained(tmp_path / "base")
    words = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps({**words, "dtype": "bfloat16"}))
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config).save_pretrained(tmp_path / "theirs")
    model = ModelConfig("hf", str(tmp_path / "base"))
    merge(MergeCommandConfig(adapter_path=str(tmp_path / "theirs"), model=model, output=str(tmp_path / "merged")))
    stored, merged = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "merged"))
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16, torch.float32}
    assert {name: t.dtype for name, t in merged.items()} == {name: t.dtype for name, t in stored.items()}
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == "bfloat16"
