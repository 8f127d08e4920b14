"""Trained parameters of published models, exact integers computed from their shapes on the meta device."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft.adapters.inject import inject_adapters, trainable_parameter_counts
from lightning_peft.adapters.registry import METHODS

SHAPES: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "llama_2_7b": (32, 4096, 32, 32, 11008, 32000, False),
    "llama_3_8b": (32, 4096, 32, 8, 14336, 128256, False),
    "llama_13b": (40, 5120, 40, 40, 13824, 32000, False),
    "llama_3_70b": (80, 8192, 64, 8, 28672, 128256, False),
    "llama_3_2_3b": (28, 3072, 24, 8, 8192, 128256, True),
}
"""Blocks, width, heads, key-value heads, feed-forward width, vocabulary, tied."""

QV = "query_value"
ALL = "all_linear"


@cache
def shape_config(model: str) -> LlamaConfig:
    blocks, width, heads, kv_heads, ff, vocabulary, tied = SHAPES[model]
    return LlamaConfig(
        num_hidden_layers=blocks,
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        intermediate_size=ff,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )


def meta_model(model: str) -> nn.Module:
    with torch.device("meta"):
        built = LlamaForCausalLM(shape_config(model))
    built.tie_weights()
    return built


def trained(model: str, method: str, **options: Any) -> int:
    built = meta_model(model)
    inject_adapters(built, METHODS[method].config(**options))
    return trainable_parameter_counts(built)[0]


@pytest.mark.parametrize(
    ("model", "total"),
    [
        ("llama_2_7b", 6_738_415_616),
        ("llama_3_8b", 8_030_261_248),
        ("llama_13b", 13_015_864_320),
        ("llama_3_70b", 70_553_706_496),
        ("llama_3_2_3b", 3_212_749_824),
    ],
)
def test_base_total(model: str, total: int) -> None:
    assert trainable_parameter_counts(meta_model(model))[1] == total


@pytest.mark.parametrize(
    ("model", "target_modules", "per_rank"),
    [
        ("llama_2_7b", ALL, 2_498_560),
        ("llama_2_7b", QV, 524_288),
        ("llama_3_8b", ALL, 2_621_440),
        ("llama_3_8b", QV, 425_984),
        ("llama_13b", ALL, 3_911_680),
        ("llama_3_70b", ALL, 12_943_360),
        ("llama_3_2_3b", ALL, 1_519_616),
        ("llama_3_2_3b", QV, 286_720),
    ],
)
def test_lora_parameters_per_rank(model: str, target_modules: str, per_rank: int) -> None:
    assert trained(model, "lora", rank=16, target_modules=target_modules) == 16 * per_rank


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("lora", {"rank": 32}, 9_175_040),
        ("hira", {"rank": 32}, 9_175_040),
        ("dora", {"rank": 32}, 9_289_728),
        ("vera", {"rank": 256}, 129_024),
        ("lora_fa", {"rank": 32}, 3_670_016),
        ("miss", {"rank": 64}, 7_340_032),
        ("adalora", {"rank": 64}, 18_353_664),
        ("ia3", {"target_modules": "key_value_down"}, 286_720),
    ],
)
def test_counts_of_pefts_own_benchmark(method: str, options: dict[str, Any], expected: int) -> None:
    """HF PEFT's published counts on Llama-3.2-3B; q and v unless the method says otherwise."""
    assert trained("llama_3_2_3b", method, **{"target_modules": QV, **options}) == expected


def test_dora_on_llama_3_8b() -> None:
    assert trained("llama_3_8b", "dora", rank=16) == 43_319_296


def test_molf_e_on_llama_3_8b() -> None:
    assert trained("llama_3_8b", "molf_e") == 136 * 2_621_440 == 356_515_840


def test_lr_lora_on_llama_3_8b() -> None:
    """LoRA's, and eight coefficients and a width for each of 224 layers."""
    assert trained("llama_3_8b", "lr_lora", rank=16) == 41_943_040 + 224 * 9 == 41_945_056


def test_balora_on_llama_3_8b() -> None:
    """LoRA's on q and v, and a network of two hidden layers of 256 for 64 variances."""
    assert trained("llama_3_8b", "balora", rank=16, target_modules=QV) == 6_815_744 + 1_131_072 == 7_946_816


@pytest.mark.parametrize(("model", "expected"), [("llama_2_7b", 1_589_248), ("llama_13b", 2_416_640)])
def test_vera_of_the_paper(model: str, expected: int) -> None:
    """Table 4: 1.6M and 2.4M at rank 1024 on all linear layers."""
    assert trained(model, "vera", rank=1024) == expected


def test_lora_share_of_llama_3_8b() -> None:
    model = meta_model("llama_3_8b")
    inject_adapters(model, METHODS["lora"].config(rank=16))

    assert trainable_parameter_counts(model) == (41_943_040, 8_072_204_288)


@pytest.mark.parametrize("dimension", [200, 1000])
def test_intrinsic_trains_exactly_d(dimension: int) -> None:
    assert trained("llama_3_2_3b", "intrinsic", dimension=dimension) == dimension


def test_full_trains_everything() -> None:
    model = meta_model("llama_3_2_3b")

    assert inject_adapters(model, METHODS["full"].config()) == []
    assert trainable_parameter_counts(model) == (3_212_749_824, 3_212_749_824)
