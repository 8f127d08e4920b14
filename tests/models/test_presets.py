"""Presets of current models: their names, their sizes, and that adapters train on layers of their widths."""

import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from published_shapes import EVERYDAY, SHAPES, first_layers, shape
from transformers import AutoModelForCausalLM

from lightning_peft.adapters.inject import adapters, inject_adapters
from lightning_peft.adapters.lora import LoRAConfig
from lightning_peft.compose import compose_config
from lightning_peft.data.chat import Encoded
from lightning_peft.data.collate import collate
from lightning_peft.models.loading import load_model
from lightning_peft.models.source import ModelConfig
from lightning_peft.models.tiny import tiny_tokenizer
from lightning_peft.objectives.sft import SupervisedLoss

OLDER = {"llama_7b", "llama_2_7b", "llama_3_8b", "llama_3_1_8b", "llama_3_1_70b", "llama_3_2_1b", "llama_3_2_3b"}
NOT_PUBLISHED_HERE = OLDER | {"mistral_7b", "qwen_2_5_7b", "smollm2_135m", "hf", "tiny"}


def test_every_preset_has_its_sizes_here():
    presets = {path.stem for path in Path("conf/model").glob("*.yaml")}
    assert presets - NOT_PUBLISHED_HERE == set(SHAPES)


@pytest.mark.parametrize("name", SHAPES)
def test_preset_is_one_model_of_the_hub(name):
    preset = OmegaConf.load(f"conf/model/{name}.yaml")
    assert (preset.name, preset.label) == ("hf", name)
    assert re.fullmatch(r"[\w-]+/[\w.-]+", preset.path)


def test_preset_is_chosen_by_its_name():
    assert compose_config("train", ["method=qlora", "model=qwen3_8b"]).model.path == "Qwen/Qwen3-8B"


@pytest.mark.parametrize("name", SHAPES)
def test_sizes_are_the_published_ones_and_adapters_fit_them(name):
    billions = SHAPES[name][2]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape(name))
        few = AutoModelForCausalLM.from_config(first_layers(name, layers=2, words=320, experts=4))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.012)
    with torch.device("meta"):
        inject_adapters(few, LoRAConfig(rank=16))
    expected = sum(16 * (layer.base_layer.in_features + layer.base_layer.out_features) for _, layer in adapters(few))
    assert 0 < expected == sum(p.numel() for p in few.parameters() if p.requires_grad)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERYDAY)
def test_layers_of_published_widths_learn(name, tmp_path):
    config = first_layers(name, layers=2, words=320, experts=4)
    config.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = load_model(ModelConfig("hf", str(tmp_path), random_weights=True), torch.float32)
    torch.manual_seed(0)
    inject_adapters(model, LoRAConfig(rank=8))
    objective = SupervisedLoss(model).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.randint(3, 300, (24,), generator=torch.Generator().manual_seed(0)).tolist()
    batch = collate([[Encoded(ids, [-100, *ids[1:]], True)]], 0, 24, False)
    losses = []
    for _ in range(3):
        loss = objective(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
