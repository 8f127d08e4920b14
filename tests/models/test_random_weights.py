"""Random weights fill any model, dense or 4-bit, the same way each time."""

from dataclasses import replace

import pytest
import torch

from lightning_peft.models.loading import load_model
from lightning_peft.models.source import ModelConfig
from lightning_peft.models.stored import source_fingerprint
from lightning_peft.models.tiny import tiny_config
from lightning_peft.quantization.config import Kind, QuantizationConfig
from lightning_peft.quantization.linear import QuantizedLinear


@pytest.fixture
def config(tmp_path, request):
    tiny_config(tied=getattr(request, "param", False)).save_pretrained(tmp_path)
    return ModelConfig("hf", str(tmp_path), random_weights=True)


@pytest.mark.parametrize("config", [False, True], indirect=True, ids=["untied", "tied"])
def test_dense_model_is_drawn_alike_twice(config):
    model, again = load_model(config, torch.float32), load_model(config, torch.float32)
    for (name, parameter), other in zip(model.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=0, atol=0)
        if parameter.ndim == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
        else:
            assert (parameter == 1).all(), name
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings


def test_quantised_model_holds_the_codes_of_the_dense_one(config):
    dense = load_model(config, torch.float32)
    quantised = load_model(config, torch.float32, QuantizationConfig(Kind.nf4))
    layer, weight = quantised.model.layers[1].mlp.up_proj, dense.model.layers[1].mlp.up_proj.weight
    assert isinstance(layer, QuantizedLinear)
    assert (layer.dequantize() - weight).abs().max() < 0.2 * weight.abs().max()


def test_fingerprint_is_of_the_shapes(config, tmp_path):
    assert source_fingerprint(config) == source_fingerprint(replace(config))
    bigger = tiny_config()
    bigger.intermediate_size = 256
    bigger.save_pretrained(tmp_path / "bigger")
    assert source_fingerprint(config) != source_fingerprint(replace(config, path=str(tmp_path / "bigger")))


def test_tiny_is_random_already():
    with pytest.raises(ValueError, match="random without it"):
        ModelConfig("tiny", random_weights=True)
