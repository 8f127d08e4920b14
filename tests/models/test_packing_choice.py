import logging

import pytest
import torch
from families import small_model
from transformers import Phi3Config, Phi3ForCausalLM

from lightning_peft.data.config import DataConfig
from lightning_peft.models.packing_choice import obstacle_to_one_row, packing_of
from lightning_peft.models.source import VARLEN


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


@pytest.mark.parametrize(("max_length", "packs"), [(64, True), (65, False)])
def test_two_sets_of_frequencies_are_not_mixed(max_length: int, packs: bool) -> None:
    """Phi 3's longrope takes the second set for a whole batch that has one sample beyond the context trained on."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    config = Phi3Config(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=96, pad_token_id=0,
        max_position_embeddings=256, original_max_position_embeddings=64,
        rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, **factors},
    )  # fmt: skip
    with torch.device("meta"):
        model = Phi3ForCausalLM(config)
    assert packing_of(DataConfig(max_length=max_length), model) is packs
    model.set_attn_implementation(VARLEN)
    assert ("would set the rotary frequencies" in obstacle_to_one_row(model, max_length)) is not packs


@pytest.mark.parametrize(
    ("family", "option"),
    [
        ("llama", "attention_dropout"),
        ("opt", "dropout"),
        ("opt", "layerdrop"),
        ("seed_oss", "residual_dropout"),
        ("mixtral", "router_jitter_noise"),
        ("gpt2", "resid_pdrop"),
    ],
)
def test_model_that_draws_random_numbers_takes_no_samples_of_several_runs(family: str, option: str) -> None:
    """They are drawn in functions as well as in modules, so the configuration tells."""
    model = small_model(family, **({"residual_dropout": 0.0} if family == "seed_oss" else {}))
    model.set_attn_implementation(VARLEN)
    assert obstacle_to_one_row(model, 64) == ""  # GPT-2's summary_first_dropout is for another head
    setattr(model.config, option, 0.1)
    assert obstacle_to_one_row(model, 64) == (
        f"models of type {family} draw random numbers ({option}=0.1), which would not be those of a trial alone"
    )
