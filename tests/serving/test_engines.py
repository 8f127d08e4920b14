"""The verdicts of the table of engines on an adapter: a test a cell, and the lines and refusals made of them."""

import pytest

from lightning_peft.adapters.base import AdapterConfig
from lightning_peft.adapters.bias import Bias
from lightning_peft.adapters.lora import LoRAConfig
from lightning_peft.adapters.registry import METHODS
from lightning_peft.serving.engines import (
    Outcome,
    check_target_servers,
    engines,
    features_of,
    refuse_wrong_engines,
    verdict,
)


def config_of(feature: str) -> AdapterConfig:
    """Return an adapter with one feature beside plain LoRA."""
    options = {
        "rslora": {"rank_stabilized": True},
        "rank_pattern": {"rank_pattern": {"q_proj": 4}},
        "alpha_pattern": {"alpha_pattern": {"q_proj": 4.0}},
        "fractional_alpha": {"alpha": 8.5},
        "some_blocks": {"layers": "1-"},
        "rewritten_base": {"init": "pissa"},
        "trained_modules": {"trainable_modules": ["norm"]},
        "trained_embeddings": {"trainable_modules": ["embed_tokens"]},
        "trained_biases": {"bias": Bias.all},
        "adapted_experts": {"experts": "auto"},
        "adapted_head": {"target_modules": ["q_proj", "lm_head"]},
        "adapted_embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    }
    if feature in METHODS and feature != "lora":
        row = METHODS[feature]
        return row.config(**({"rank": 8} if row.config.uses_rank else {}))
    return LoRAConfig(rank=8, **options.get(feature, {}))


OK, NO, BAD = Outcome.ok, Outcome.refuses, Outcome.wrong
ORDER = ("vllm", "llama_cpp", "sglang", "lorax", "tgi", "ollama")
OUTCOMES = {
    "lora": (OK, OK, OK, OK, OK, BAD),
    "rslora": (OK, BAD, BAD, OK, OK, BAD),
    "rank_pattern": (OK, BAD, NO, BAD, BAD, BAD),
    "alpha_pattern": (OK, BAD, BAD, BAD, BAD, BAD),
    "fractional_alpha": (OK, OK, OK, OK, OK, NO),
    "some_blocks": (OK, OK, OK, BAD, BAD, OK),
    "rewritten_base": (OK, OK, OK, OK, OK, BAD),
    "unconverted_start": (NO, BAD, BAD, BAD, BAD, BAD),
    "dora": (NO, NO, NO, BAD, BAD, NO),
    "adalora": (NO, NO, NO, BAD, BAD, NO),
    "vera": (NO, NO, NO, NO, NO, NO),
    "hira": (NO, NO, NO, NO, NO, NO),
    "ia3": (NO, NO, NO, NO, NO, NO),
    "miss": (NO, NO, NO, NO, NO, NO),
    "intrinsic": (NO, NO, NO, NO, NO, NO),
    "trained_modules": (NO, BAD, BAD, BAD, BAD, NO),
    "trained_embeddings": (NO, NO, BAD, BAD, BAD, NO),
    "trained_biases": (NO, NO, BAD, BAD, BAD, NO),
    "adapted_experts": (NO, NO, NO, BAD, BAD, NO),
    "adapted_head": (OK, OK, OK, OK, OK, NO),
    "adapted_embeddings": (OK, OK, OK, BAD, BAD, NO),
}
"""Verdicts seen, or read in the engines' code, on the folder that `train` writes."""


OF_FOLDERS = ("unconverted_start",)
"""Features that a folder of HF PEFT has, and no training of ours leads to: tests/commands/test_export.py."""


@pytest.mark.parametrize("feature", OUTCOMES)
@pytest.mark.parametrize("engine", ORDER)
def test_cell(engine: str, feature: str) -> None:
    features = ["lora", feature] if feature in OF_FOLDERS else features_of(config_of(feature))
    assert feature in features
    features = [each for each in features if each == feature or engines()[engine].cells[each].outcome is Outcome.ok]
    assert verdict(engines()[engine], features, 8, None).outcome is OUTCOMES[feature][ORDER.index(engine)]


def test_every_engine_has_every_cell() -> None:
    for engine in engines().values():
        assert engine.cells.keys() == {*OUTCOMES, "other_method"}
        assert set(engine.kept) <= engine.cells.keys()


@pytest.mark.parametrize("feature", ["rslora", "rank_pattern", "alpha_pattern", "adalora", "vera", "rewritten_base"])
@pytest.mark.parametrize(("engine", "format"), [("sglang", "plain"), ("llama_cpp", "gguf_lora"), ("ollama", "ollama")])
def test_an_export_is_computed_rightly_where_the_folder_is_not(engine: str, format: str, feature: str) -> None:
    assert verdict(engines()[engine], features_of(config_of(feature)), 8, format).outcome is Outcome.ok


@pytest.mark.parametrize(
    ("layers", "is_some"),
    [
        (["layers.0.q_proj", "layers.1.q_proj", "lm_head"], False),
        (["layers.0.q_proj", "layers.1.q_proj", "layers.1.v_proj"], True),
        (["layers.1.q_proj"], True),
        ("all_linear", False),
    ],
)
def test_layers_that_one_block_lacks_are_told_by_their_names(layers: list[str] | str, is_some: bool) -> None:
    assert ("some_blocks" in features_of(LoRAConfig(target_modules=layers))) is is_some


@pytest.mark.parametrize(
    ("rank", "says"),
    [(16, "computes it rightly"), (17, "needs --max-lora-rank 32"), (300, "--max-lora-rank 320"), (513, "refuses it")],
)
def test_vllm_is_told_the_rank(rank: int, says: str) -> None:
    assert says in verdict(engines()["vllm"], ["lora"], rank, "plain").text


@pytest.mark.parametrize(
    ("engine", "feature", "format", "says"),
    [
        ("llama_cpp", "lora", "plain", "llama.cpp does not read format=plain; use format=gguf_lora"),
        ("vllm", "lora", "gguf", "vLLM does not read format=gguf; use format=plain"),
        ("vllm", "dora", "gguf", "vLLM does not read format=gguf; use `lightning-peft merge`"),
        ("llama_cpp", "dora", "ollama", "llama.cpp does not read format=ollama; use format=gguf"),
        ("tgi", "adapted_embeddings", "plain", "would compute it wrongly .adapted embeddings."),
    ],
)
def test_an_engine_that_is_named_must_compute_it(engine: str, feature: str, format: str, says: str) -> None:
    with pytest.raises(ValueError, match=f"engine={engine} format={format}: .*{says}"):
        refuse_wrong_engines([engine], features_of(config_of(feature)), 8, format)


def test_target_servers_are_checked_by_the_config_alone() -> None:
    assert check_target_servers(["vllm"], LoRAConfig(rank=32)) == [
        "target_server=vllm: vLLM computes it rightly; needs --max-lora-rank 32"
    ]
    (line,) = check_target_servers(["llama_cpp"], config_of("rslora"))
    assert "after `export format=gguf_lora`, as it would compute it wrongly (rsLoRA)" in line
    with pytest.raises(ValueError, match="target_server=vllm: vLLM cannot serve DoRA beside its base"):
        check_target_servers(["vllm"], config_of("dora"))
    (line,) = check_target_servers(["llama_cpp"], config_of("dora"))
    assert "computes it rightly after `export format=gguf`, as it refuses it (DoRA)" in line
    with pytest.raises(ValueError, match="target_server=vlm: no such engine in the table; choose from vllm"):
        check_target_servers(["vlm"], LoRAConfig())
