"""Adapters that share a server's base: what would be answered otherwise than by `generate` is said or refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapter_models import config_for
from families import small_model
from server_process import save

from lightning_peft.adapters.inject import inject_adapters
from lightning_peft.adapters.slots import Slots
from lightning_peft.checkpoint.lineage import FILE_NAME, LineageError
from lightning_peft.checkpoint.peft_format import save_adapter
from lightning_peft.commands.serve import checked, say_other_dtypes, try_adapters
from lightning_peft.commands.serve_vllm import Served
from lightning_peft.inference.continuous_batching import Decoder
from lightning_peft.models.rope import RopeScaling
from lightning_peft.models.source import ModelConfig
from lightning_peft.models.stored import source_fingerprint
from lightning_peft.quantization.config import Kind, QuantizationConfig

TINY = ModelConfig("tiny")
SCALED = {"type": "linear", "factor": 2.0, "original_max_position_embeddings": None}

SERVABLE = {"mamba": ["in_proj"], "opt": ["q_proj", "v_proj"]}
OF_SCALED = ModelConfig("hf", "base", rope_scaling=RopeScaling(**SCALED))
OF_TOKENS = ModelConfig("hf", "base", new_tokens=["<a>"])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    save(folder := tmp_path_factory.mktemp("adapter"), config_for("lora", rank=2), 0.3)
    return folder


def trained(folder: Path, **changes: object) -> dict[str, Path]:
    """Return the adapter as if it had been trained otherwise."""
    path = folder / FILE_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return {"a": folder}


def served(base: ModelConfig = TINY, kind: Kind = Kind.none) -> Served:
    return Served("tiny", base, QuantizationConfig(kind=kind), source_fingerprint(TINY), None)


@pytest.mark.parametrize(
    ("model", "base", "says"),
    [
        ({"rope_scaling": SCALED}, TINY, "was trained with the scaling .*type=linear .*, the base has none"),
        ({"name": "tiny"}, OF_SCALED, "was trained with the scaling none, the base has model"),
        ({"new_tokens": ["<a>", "<b>"]}, OF_TOKENS, "knows tokens .* has not, <b>"),
    ],
    ids=["scaled", "not_scaled", "tokens"],
)
def test_an_adapter_of_other_positions_or_tokens_is_refused(adapter, model, base, says) -> None:
    with pytest.raises(ValueError, match=f"adapters: a=.*: {says}.*; give it a server of its own"):
        checked(trained(adapter, config={"model": model}), served(base))


def test_one_that_was_trained_as_the_base_is_served_passes(adapter, caplog) -> None:
    config = {"model": {"rope_scaling": {"type": None}, "new_tokens": []}}
    with caplog.at_level("INFO"):
        assert checked(trained(adapter, config=config, quantization="nf4"), served(kind=Kind.nf4)) == (
            [2],
            None,
            [("a", adapter)],
        )
    assert "outputs differ" not in caplog.text
    with caplog.at_level("INFO"):
        checked(trained(adapter, config={}, quantization="none"), served(kind=Kind.nf4))
    assert "quantization.kind=none, this one has nf4: outputs differ" in caplog.text
    with pytest.raises(LineageError):
        checked(trained(adapter), replace(served(), fingerprint="0" * 64))


def test_an_adapter_that_was_trained_in_another_dtype_is_named(adapter, caplog) -> None:
    say_other_dtypes([*trained(adapter, precision="bf16-true").items()], torch.bfloat16)
    assert not caplog.records
    say_other_dtypes([*trained(adapter, precision="bf16-true").items()], torch.float32)
    assert "adapters: a was trained in bf16-true and is served in float32" in caplog.text


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "says"), [("mamba", "no attribute 'weight'"), ("opt", "needs as many routes")])
def test_a_model_that_computes_with_its_layers_by_itself_is_said_at_the_start(family, says, tmp_path) -> None:
    """Every request to the adapter had status 500; with layers that the model calls it is served."""
    for name, targets in (("good", SERVABLE[family]), ("bad", "all_linear")):
        model, config = small_model(family), config_for("lora", rank=2, target_modules=targets)
        inject_adapters(model, config)
        save_adapter(model, config, tmp_path / name)
    model = small_model(family).requires_grad_(False)
    slots = Slots(model, 1, 2, torch.float32)
    decoder = Decoder(model, slots)
    try_adapters(decoder, slots, [("good", tmp_path / "good")])
    with pytest.raises(ValueError, match=f"adapters: bad=.* cannot be asked .*{says}.*lightning-peft merge"):
        try_adapters(decoder, slots, [("good", tmp_path / "good"), ("bad", tmp_path / "bad")])
