import logging

import pytest
from families import small_model

from lightning_peft.data.config import DataConfig
from lightning_peft.models.packing import packing_of


def test_auto_packs_where_samples_stay_apart(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert packing_of(DataConfig(), small_model("llama")) is True
        assert caplog.text == ""
        assert packing_of(DataConfig(), small_model("mamba")) is False
    assert "packed samples would see each other in MambaForCausalLM, so rows are padded" in caplog.text


def test_true_refuses_what_would_mix_samples() -> None:
    with pytest.raises(ValueError, match="data.packing=true: packed samples would see each other in MambaForCausalLM"):
        packing_of(DataConfig(packing=True), small_model("mamba"))


def test_false_never_packs() -> None:
    assert packing_of(DataConfig(packing=False), small_model("llama")) is False


def test_another_word_is_refused() -> None:
    with pytest.raises(ValueError, match="data.packing=yes: must be auto, true or false"):
        DataConfig(packing="yes")
