"""Vision left on disk: the text of a multimodal checkpoint loads and trains, and the merged checkpoint is whole."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import DELTA_NET
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lightning_peft.__main__ import main
from lightning_peft.adapters.inject import adapters, inject_adapters
from lightning_peft.adapters.lora import LoRAConfig
from lightning_peft.models.loading import empty_model, load_model
from lightning_peft.models.multimodal import LeftOnDisk
from lightning_peft.models.source import ModelConfig
from lightning_peft.models.tiny import tiny_tokenizer
from lightning_peft.quantization.bitsandbytes_format import to_bitsandbytes_state
from lightning_peft.quantization.config import Kind, QuantizationConfig
from lightning_peft.quantization.experts import QuantizedExperts
from lightning_peft.quantization.linear import QuantizedLinear
from lightning_peft.quantization.quantize import dequantized_layer

IDS = torch.arange(3, 43)[None]
FAMILIES = {
    "qwen2_5_vl": "model.visual", "qwen3_vl": "model.visual", "gemma3": "model.vision_tower",
    "mistral3": "model.vision_tower", "qwen3_5": "model.visual",
}  # fmt: skip
"""Model type: where its vision tower is."""
TEXT = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "intermediate_size_mlp": 96, "num_local_experts": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "depth": 1, "num_attention_heads": 4,
    "num_heads": 4, "image_size": 28, "patch_size": 14, "out_hidden_size": 64, "embed_dim": 64,
    "fullatt_block_indexes": [0], "vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64,
    "deepstack_visual_indexes": [0], "num_position_embeddings": 16, "vision_use_head": False, "head_dim": 16,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
OPTIONS: dict[str, dict[str, Any]] = {
    "qwen3_5": {**DELTA_NET, "rope_parameters": ROPE | {"partial_rotary_factor": 1.0}},
    "qwen3_vl": {"rope_parameters": ROPE},
    "qwen3_vl_moe": {
        "rope_parameters": ROPE,
        "moe_intermediate_size": 96,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen2_5_vl": {"rope_parameters": ROPE},
}


def multimodal_folder(model_type: str, folder: Path) -> ModelConfig:
    kind = CONFIG_MAPPING[model_type]
    default = kind()
    text = {name: value for name, value in TEXT.items() if hasattr(default.text_config, name)}
    vision = {name: value for name, value in VISION.items() if hasattr(default.vision_config, name)}
    config = kind(text_config=text | OPTIONS.get(model_type, {}), vision_config=vision)
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2, generator=generator)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return ModelConfig("hf", str(folder))


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ModelConfig]:
    return request.param, multimodal_folder(request.param, tmp_path_factory.mktemp(request.param) / "base")


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits


def stored(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert not found.keys() & set(file.keys())
            found |= {name: file.get_tensor(name) for name in file.keys()}
    return found


@pytest.mark.filterwarnings("ignore")
def test_text_is_loaded_without_the_tower(
    checkpoint: tuple[str, ModelConfig], caplog: pytest.LogCaptureFixture
) -> None:
    name, config = checkpoint
    whole = AutoModelForImageTextToText.from_pretrained(config.path, dtype=torch.float32)
    with caplog.at_level(logging.INFO):
        model = load_model(config, torch.float32)

    assert isinstance(model.get_submodule(FAMILIES[name]), LeftOnDisk)
    towers = {n: p for n, p in whole.named_parameters() if n.startswith(FAMILIES[name])}
    assert towers and model.state_dict().keys() == whole.state_dict().keys() - {
        n for n in whole.state_dict() if n.startswith(FAMILIES[name])
    }
    assert not any(parameter.is_meta for parameter in model.parameters())
    torch.testing.assert_close(logits(model), logits(whole), rtol=0, atol=1e-4 * float(logits(whole).abs().max()))
    assert "stay on disk: text alone is trained" in caplog.text and "are not in the model" not in caplog.text
    assert empty_model(config).state_dict().keys() == model.state_dict().keys()
    with pytest.raises(RuntimeError, match="is left on disk: models are run on text alone here"):
        model.get_submodule(FAMILIES[name])(torch.ones(1))


@pytest.mark.filterwarnings("ignore")
def test_all_linear_and_codes_are_of_the_text(checkpoint: tuple[str, ModelConfig]) -> None:
    _, config = checkpoint
    model = load_model(config, torch.float32, QuantizationConfig(Kind.nf4, block_size=32))
    inject_adapters(model, LoRAConfig(rank=2))
    names = [name for name, _ in adapters(model)]
    assert names and all(".layers." in name for name in names)
    assert logits(model).isfinite().all()


@pytest.mark.filterwarnings("ignore")
def test_a_run_is_merged_into_the_whole_checkpoint(checkpoint: tuple[str, ModelConfig], tmp_path: Path) -> None:
    name, config = checkpoint
    base = Path(str(config.path))
    rows = [json.dumps({"prompt": f"Add {a}.", "completion": f"It is {a + 1}."}) + "\n" for a in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    words = [
        "train", f"model={base}", f"data={tmp_path}/rows.jsonl", "data.max_length=56", "data.micro_batch_size=4",
        "rank=r2", "trainer.max_steps=3", "optimizer.lr=0.05", "schedule=constant", "trainer.accelerator=cpu",
        "trainer.precision=32-true", f"run_dir={tmp_path}/run",
    ]  # fmt: skip
    assert main(words) == 0
    assert main(["merge", f"adapter_path={tmp_path}/run", f"output={tmp_path}/merged"]) == 0

    before, after = stored(base), stored(tmp_path / "merged")
    assert before.keys() == after.keys()
    part = FAMILIES[name].rpartition(".")[2]
    seen = [key for key in before if part in key]
    assert seen and all(torch.equal(before[key], after[key]) for key in seen)
    assert any(not torch.equal(before[key], after[key]) for key in before)
    whole, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    original = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    assert float((logits(whole) - logits(original)).abs().max()) > 1e-3
    assert torch.equal(logits(load_model(ModelConfig("hf", f"{tmp_path}/merged"), torch.float32)), logits(whole))


@pytest.mark.filterwarnings("ignore")
def test_experts_whose_rule_asks_for_their_shape_are_coded(tmp_path: Path) -> None:
    """transformers turns them where the file has them the other way round, which it sees by the parameter's shape."""
    config = multimodal_folder("qwen3_vl_moe", tmp_path)
    dense = load_model(config, torch.float32)
    coded = load_model(config, torch.float32, QuantizationConfig(Kind.nf4, block_size=32))
    stacks = {name: m for name, m in coded.named_modules() if isinstance(m, QuantizedExperts)}
    assert len(stacks) == 4
    for name, stack in stacks.items():
        weight, close = dense.get_parameter(name), dequantized_layer(stack).weight
        assert close.shape == weight.shape
        assert float((close - weight).norm() / weight.norm()) < 0.12  # NF4's rounding of normal weights is 0.09
    torch.testing.assert_close(logits(dense), logits(AutoModelForImageTextToText.from_pretrained(tmp_path)))


@pytest.mark.filterwarnings("ignore")
def test_llama_4_is_its_text_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """transformers 5.24 cannot run text through the whole model."""
    config = multimodal_folder("llama4", tmp_path)
    with pytest.raises(AttributeError, match="image_outputs"):
        logits(AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32))
    model = load_model(config, torch.float32)
    assert type(model).__name__ == "Llama4ForCausalLM" and "vision_model.class_embedding" not in model.state_dict()
    assert "weights of the checkpoint are not in the model: multi_modal_projector" in caplog.text
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=1e-4 * float(logits(plain).abs().max()))


def test_a_tower_in_codes_is_refused(tmp_path: Path) -> None:
    config = multimodal_folder("mistral3", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    key = next(name for name in tensors if "vision" in name and name.endswith("q_proj.weight"))
    codes = to_bitsandbytes_state(QuantizedLinear.from_weight(tensors.pop(key)))
    tensors |= {f"{key.removesuffix('.weight')}.{end}": part for end, part in codes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"{re.escape(key)} is held as 4-bit codes .*give the original model"):
        load_model(config, torch.float32)
