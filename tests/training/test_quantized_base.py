"""Training on a 4-bit base: the log's words about it, and the proof that it does not change."""

import logging
import math

import pytest
import torch
from lightning.pytorch import LightningDataModule
from tiny_runs import plain_trainer, tiny_config, tiny_parts

from lightning_peft.quantization.linear import QuantizedLinear
from lightning_peft.quantization.quantize import weights_fingerprint

VERIFIED = ["method=qlora", "quantization.verify=true"]


def test_start_states_bytes_bits_and_fingerprint(tmp_path, caplog):
    module, data = tiny_parts(tiny_config(tmp_path, *VERIFIED))
    with caplog.at_level(logging.INFO, logger="lightning_peft"):
        plain_trainer(max_steps=1).fit(module, datamodule=data)
    layers = [layer for layer in module.model.modules() if isinstance(layer, QuantizedLinear)]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    trained = sum(p.numel() for p in module.trainable_parameters())
    # Four bits a weight and eight a block of 64; fp32 a 256 of these and one mean a layer; AdamW keeps two fp32 states.
    stored = sum(32 * (math.ceil(layer.in_features * layer.out_features / 64 / 256) + 1) for layer in layers)
    line = next(message for message in caplog.messages if message.startswith("memory: "))
    assert f"codes {weights / 2 / 2**20:.1f} MiB" in line and "scales " in line and "embeddings " in line
    assert f"trainable {4 * trained / 2**20:.1f} MiB" in line and f"optimiser {8 * trained / 2**20:.1f} MiB" in line
    assert line.endswith(f"; {4 + 8 / 64 + stored / weights:.3f} bits a quantised parameter")
    assert module.base_fingerprint == weights_fingerprint(module.model)
    assert module.base_fingerprint in caplog.text


def test_changed_base_is_an_error(tmp_path):
    module, data = tiny_parts(tiny_config(tmp_path, *VERIFIED))
    module.configure_model()
    layer = module.model.model.layers[0].mlp.up_proj.base_layer
    with torch.no_grad():
        layer.weight[0, 0] ^= 0xFF
    with pytest.raises(RuntimeError, match="not those that were loaded"):
        plain_trainer(max_steps=1).fit(module, datamodule=data)


class OwnData(LightningDataModule):
    """Somebody's own: it has loaders alone."""

    def __init__(self, data):
        super().__init__()
        self.data = data

    def setup(self, stage=None):
        self.data.setup(stage)

    def train_dataloader(self):
        return self.data.train_dataloader()

    def val_dataloader(self):
        return self.data.val_dataloader()


def test_adapters_that_start_from_weights_need_no_batches_of_the_data(tmp_path):
    module, data = tiny_parts(tiny_config(tmp_path, "quantization=nf4", "adapter.init=pissa"))
    plain_trainer(max_steps=1).fit(module, datamodule=OwnData(data))
    assert module.trainer.global_step == 1


def test_adapters_that_start_from_activations_say_which_data_they_need(tmp_path):
    module, data = tiny_parts(tiny_config(tmp_path, "adapter.init=eva"))
    with pytest.raises(ValueError, match="adapter.init=eva looks at activations"):
        plain_trainer(max_steps=1).fit(module, datamodule=OwnData(data))
