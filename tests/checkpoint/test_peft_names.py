"""HF PEFT's folders of other versions of transformers."""

import pytest
import torch
from families import small_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, Gemma3Config

from lightning_peft.adapters.inject import adapters, inject_adapters
from lightning_peft.adapters.lora import LoRAConfig
from lightning_peft.checkpoint.peft_check import objection_of_peft
from lightning_peft.checkpoint.peft_format import adapter_config_from_peft, load_adapter, save_adapter
from lightning_peft.commands.tuned import is_read_otherwise
from lightning_peft.models.forwards import keep_weights_in_evaluation

IDS = torch.arange(3, 43)[None]
WEIGHTS = "adapter_model.safetensors"


def vision_language_model():
    text = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
    }  # fmt: skip
    vision = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28,
        "patch_size": 14, "vision_use_head": False,
    }  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=90)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0, 0.2)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, token_type_ids=torch.zeros_like(IDS), use_cache=False).logits


def test_names_of_vision_language_models_before_4_52_are_read(tmp_path):
    ranks = {"layers.1.self_attn.q_proj": 2}
    config = LoraConfig(
        r=4, target_modules=r".*language_model.*q_proj", rank_pattern=ranks, init_lora_weights=False, use_dora=True
    )
    theirs = get_peft_model(vision_language_model(), config).eval()
    theirs.save_pretrained(tmp_path)
    expected = logits(theirs)
    tensors = load_file(tmp_path / WEIGHTS)
    former = {
        name.replace(".model.model.language_model.", ".model.language_model.model."): t for name, t in tensors.items()
    }
    assert former.keys().isdisjoint(tensors)
    save_file(former, tmp_path / WEIGHTS)
    ours = vision_language_model()
    inject_adapters(ours, adapter_config_from_peft(tmp_path))
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours.eval()), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_adapters_of_single_experts_are_refused_by_name(tmp_path):
    theirs = get_peft_model(small_model("mixtral"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    for layer, expert in ((0, 0), (0, 1), (1, 3)):
        name = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.w1"
        tensors |= {f"{name}.lora_A.weight": torch.ones(4, 64), f"{name}.lora_B.weight": torch.ones(32, 4)}
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(
        ValueError, match="3 layers such as .*experts.0.w1 are single experts, as transformers 4 had them"
    ):
        inject_adapters(small_model("mixtral"), adapter_config_from_peft(tmp_path))


@pytest.mark.filterwarnings("ignore")
def test_layers_that_peft_adapts_in_vain_are_said(tmp_path):
    """Jamba multiplies with the weight of dt_proj by itself: PEFT's change of that layer has no effect."""
    model, config = small_model("jamba"), LoRAConfig(rank=4, target_modules=["dt_proj"])
    inject_adapters(model, config)
    for _, layer in adapters(model):
        torch.nn.init.normal_(layer.lora_B.weight)
    save_adapter(model, config, tmp_path)
    plain = small_model("jamba")
    theirs = PeftModel.from_pretrained(small_model("jamba"), str(tmp_path)).eval()

    torch.testing.assert_close(logits(theirs), logits(plain))
    assert not torch.allclose(logits(model.eval()), logits(plain), atol=1e-2)
    assert "leaves out the change of model.layers.0.mamba.dt_proj" in objection_of_peft(tmp_path, model)


@pytest.mark.filterwarnings("ignore")
def test_layers_that_peft_has_no_place_for_are_said(tmp_path):
    """PEFT takes every gate_proj of a family of mixtures for a stack of experts, also where all layers are dense."""
    sizes = {"mlp_only_layers": [0, 1], "intermediate_size": 96}
    model, config = small_model("qwen3_moe", **sizes), LoRAConfig(rank=4)
    inject_adapters(model, config)
    for _, layer in adapters(model):
        torch.nn.init.normal_(layer.lora_B.weight)
    save_adapter(model, config, tmp_path)
    theirs = PeftModel.from_pretrained(small_model("qwen3_moe", **sizes), str(tmp_path)).eval()

    assert (logits(theirs) - logits(model.eval())).abs().max() > 1e-2
    assert is_read_otherwise(model)
    assert "finds no place for some of its tensors" in objection_of_peft(tmp_path, model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("every", "is_other"), [(1, True), (0, False), (2, False)])
def test_rwkv_is_objected_to_where_it_divides_an_adapted_weight(every, is_other, tmp_path):
    """A base that its config.json keeps whole, or with too few blocks, is read by PEFT as it is."""
    model = small_model("rwkv", rescale_every=every)
    keep_weights_in_evaluation(model)  # loading does so
    config = LoRAConfig(rank=4, target_modules=["attention.output"])
    inject_adapters(model, config)
    for _, layer in adapters(model):
        torch.nn.init.normal_(layer.lora_B.weight)
    save_adapter(model, config, tmp_path)
    theirs = PeftModel.from_pretrained(small_model("rwkv", rescale_every=every), str(tmp_path)).eval()

    with torch.no_grad():
        apart = (theirs(IDS, use_cache=False).logits - model.eval()(IDS, use_cache=False).logits).abs().max()
    assert (apart > 1e-2) == is_other
    assert (objection_of_peft(tmp_path, model) is not None) == is_other
