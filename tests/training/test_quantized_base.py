"""Training on a 4-bit base: what the log says of it, and that it does not change."""

import logging

import pytest
import torch
from tiny_runs import plain_trainer, tiny_config, tiny_parts

from lightning_peft.quantization.convert import weights_fingerprint

VERIFIED = ["method=qlora", "quantization.verify=true"]


def test_start_states_bytes_bits_and_fingerprint(tmp_path, caplog):
    module, data = tiny_parts(tiny_config(tmp_path, *VERIFIED))
    with caplog.at_level(logging.INFO, logger="lightning_peft"):
        plain_trainer(max_steps=1).fit(module, datamodule=data)
    assert "4.1" in caplog.text and "bits a quantised parameter" in caplog.text and "codes" in caplog.text
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
