"""The ladder's lowest rungs compute what the others do; every point composes."""

import json

import pytest
import torch

from benchmarks.naive import plain_adapter, plain_loss
from benchmarks.scaling import PARTS, main
from lightning_peft.adapters.inject import adapters, inject_adapters
from lightning_peft.adapters.lora import LoRAConfig, LoRALinear
from lightning_peft.compose import compose_config
from lightning_peft.data.chat import Encoded
from lightning_peft.data.collate import collate
from lightning_peft.models.loading import load_model
from lightning_peft.models.source import ModelConfig
from lightning_peft.objectives.sft import SupervisedLoss


@pytest.fixture
def model():
    model = load_model(ModelConfig("tiny"), torch.float32)
    inject_adapters(model, LoRAConfig(rank=4))
    for _, layer in adapters(model):
        torch.nn.init.normal_(layer.lora_B.weight, std=0.02)
    return model


def test_plain_loss_is_the_chunked_one(model):
    samples = [Encoded(list(range(3, n + 3)), [-100, *range(4, n + 3)], ends=True) for n in (9, 30)]
    batch = collate([samples], 0, 64, packing=True)
    objective = SupervisedLoss(model)
    torch.testing.assert_close(plain_loss(objective, batch), objective(batch))


def test_plain_adapter_is_the_fused_one(model):
    layer = next(layer for _, layer in adapters(model))
    assert isinstance(layer, LoRALinear)
    x = torch.randn(2, 5, 64)
    torch.testing.assert_close(plain_adapter(layer, x), layer(x))


@pytest.mark.parametrize("words", [point.words for part in PARTS.values() for point in part.values() if point.words])
def test_point_composes(words):
    compose_config("train", words)


@pytest.mark.slow
def test_the_ladder_is_climbed_on_a_tiny_shape(tmp_path, forked_starts):
    words = ["--part", "ladder", "rank", "--shape", "tiny", "--steps", "3", "--output", f"{tmp_path}/scaling.json"]
    assert main(words) == 0
    rows = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    assert len(rows) == len(PARTS["ladder"]) + len(PARTS["rank"])
    assert all(row["tokens_per_second"] > 0 for row in rows.values())
