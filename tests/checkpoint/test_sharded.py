"""Adapters and trainable state of a model sharded by FSDP2, on two gloo processes."""

from pathlib import Path

import pytest
import torch
from sharded_state import CONFIGS, adapted
from started import run_on_ranks

from lightning_peft.adapters.inject import inject_adapters
from lightning_peft.checkpoint.peft_format import adapter_config_from_peft, load_adapter
from lightning_peft.models.tiny import tiny_model


@pytest.mark.multi_process
def test_sharded_state_is_gathered_saved_and_restored(tmp_path: Path) -> None:
    run_on_ranks(2, Path(__file__).with_name("sharded_state.py"), tmp_path)

    for number in range(len(CONFIGS)):
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            sharded, whole = (tmp_path / f"{kind}{number}" / name for kind in ("sharded", "whole"))
            assert sharded.read_bytes() == whole.read_bytes()
    fresh = tiny_model()
    inject_adapters(fresh, adapter_config_from_peft(tmp_path / "sharded1"))
    load_adapter(fresh, tmp_path / "sharded1")
    input_ids = torch.arange(24)[None]
    expected = adapted(CONFIGS[1], seed=1)(input_ids=input_ids).logits
    torch.testing.assert_close(fresh(input_ids=input_ids).logits, expected, rtol=1e-5, atol=5e-5)
