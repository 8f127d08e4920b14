"""The target matcher over several architectures; no weights are needed."""

import logging
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_peft.adapters.base import AdapterConfig, Target
from lightning_peft.adapters.inject import describe_targets, inject_adapters
from lightning_peft.adapters.layer_names import matches, parse_layers
from lightning_peft.adapters.lora import LoRAConfig
from lightning_peft.adapters.registry import METHODS
from lightning_peft.adapters.targets import expert_share, find_targets
from lightning_peft.adapters.vera import VeRAConfig

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 128}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None}
LLAMA = {**SIZES, **HEADS, "tie_word_embeddings": False}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "bos_token_id": None, "eos_token_id": None}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "LlamaConfig": LLAMA,
    "GPT2Config": GPT2,
    "GPTNeoXConfig": LLAMA,
    "Phi3Config": {**LLAMA, "pad_token_id": 0},
    "OPTConfig": {
        "hidden_size": 64,
        "ffn_dim": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 128,
    },
    "MixtralConfig": {**LLAMA, "num_local_experts": 4},
}


def meta_model(architecture: str = "LlamaConfig", **options: Any) -> nn.Module:
    config = getattr(transformers, architecture)(**{**ARCHITECTURES[architecture], **options})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def found(model: nn.Module, **options: Any) -> list[Target]:
    return find_targets(model, LoRAConfig(**options), tuple(METHODS["lora"].layers))


def leaves(model: nn.Module, **options: Any) -> set[str]:
    return {target.name.rpartition(".")[2] for target in found(model, **options)}


@pytest.mark.parametrize(
    ("architecture", "preset", "expected"),
    [
        ("LlamaConfig", "all_linear", "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
        ("LlamaConfig", "attention", "q_proj k_proj v_proj o_proj"),
        ("LlamaConfig", "mlp", "gate_proj up_proj down_proj"),
        ("LlamaConfig", "query_value", "q_proj v_proj"),
        ("LlamaConfig", "query_key_value", "q_proj k_proj v_proj"),
        ("LlamaConfig", "key_value_down", "k_proj v_proj down_proj"),
        ("GPT2Config", "all_linear", "c_attn c_proj c_fc"),
        ("GPT2Config", "query_value", "c_attn"),
        ("GPT2Config", "key_value_down", "c_attn c_proj"),
        ("GPTNeoXConfig", "attention", "query_key_value dense"),
        ("GPTNeoXConfig", "mlp", "dense_h_to_4h dense_4h_to_h"),
        ("Phi3Config", "attention", "qkv_proj o_proj"),
        ("Phi3Config", "mlp", "gate_up_proj down_proj"),
        ("OPTConfig", "attention", "q_proj k_proj v_proj out_proj"),
        ("OPTConfig", "mlp", "fc1 fc2"),
        ("MixtralConfig", "attention", "q_proj k_proj v_proj o_proj"),
    ],
)
def test_preset_over_architectures(architecture: str, preset: str, expected: str) -> None:
    assert leaves(meta_model(architecture), target_modules=preset) == set(expected.split())


def test_gpt2_attention_and_mlp_split_c_proj() -> None:
    names = {target.name for target in found(meta_model("GPT2Config"), target_modules="mlp")}

    assert "transformer.h.0.mlp.c_proj" in names and "transformer.h.0.attn.c_proj" not in names


@pytest.mark.parametrize("architecture", ["LlamaConfig", "GPT2Config", "GPTNeoXConfig", "Phi3Config", "OPTConfig"])
def test_all_linear_is_every_linear_but_the_head(architecture: str) -> None:
    model = meta_model(architecture)
    kinds = tuple(kind for kind in METHODS["lora"].layers if kind is not nn.Embedding)
    linears = {n for n, m in model.named_modules() if isinstance(m, kinds) and m is not model.get_output_embeddings()}

    assert {target.name for target in found(model)} == linears


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("self_attn.q_proj", "model.layers.0.self_attn.q_proj", True),
        ("proj", "model.layers.0.self_attn.q_proj", False),
        ("*.1.*.q_proj", "model.layers.1.self_attn.q_proj", True),
        ("[qv]_proj", "model.layers.1.self_attn.v_proj", True),
        ("[qv]_proj", "model.layers.1.self_attn.k_proj", False),
        (r"re:.*\.(0|2)\..*_proj", "model.layers.2.mlp.up_proj", True),
        ("re:up_proj", "model.layers.2.mlp.up_proj", False),
    ],
)
def test_pattern(pattern: str, name: str, fits: bool) -> None:
    assert matches(pattern, name) is fits


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("0-3,7,10-", [0, 1, 2, 3, 7, 10, 11]), ("5", [5]), (" 1 , 3 - 4", [1, 3, 4]), ("9-", [9, 10, 11])],
)
def test_layer_ranges(layers: str, expected: list[int]) -> None:
    assert [depth for depth in range(12) if parse_layers(layers)(depth)] == expected


def test_exclude_and_layers_narrow_the_selection() -> None:
    targets = found(
        meta_model(), target_modules="attention", exclude_modules=["o_proj", "*.2.self_attn.k_proj"], layers="1-"
    )

    assert [t.name.removeprefix("model.layers.").replace(".self_attn", "") for t in targets] == [
        "1.q_proj", "1.k_proj", "1.v_proj", "2.q_proj", "2.v_proj",
    ]  # fmt: skip


def test_presets_and_names_mix_in_a_list() -> None:
    assert leaves(meta_model(), target_modules=["query_value", "lm_head", "embed_tokens"]) == {
        "q_proj", "v_proj", "lm_head", "embed_tokens",
    }  # fmt: skip


def test_last_matching_pattern_gives_rank_and_alpha() -> None:
    targets = found(meta_model(), rank=8, rank_pattern={"*_proj": 4, "q_proj": 2}, alpha_pattern={"v_proj": 5.0})

    sizes = {target.name.rpartition(".")[2]: (target.rank, target.alpha) for target in targets}
    assert sizes["q_proj"] == (2, 4.0) and sizes["k_proj"] == (4, 8.0) and sizes["v_proj"] == (4, 5.0)


def test_alpha_is_twice_the_rank_unless_given() -> None:
    assert {t.alpha for t in found(meta_model(), rank=8)} == {16.0}
    assert {t.alpha for t in found(meta_model(), rank=8, alpha=4.0)} == {4.0}


def test_tapered_rank_is_linear_in_depth() -> None:
    targets = found(meta_model(num_hidden_layers=5), rank=8, rank_last=24, target_modules=["q_proj"])

    assert [target.rank for target in targets] == [8, 12, 16, 20, 24]


def test_unknown_name_lists_counts_and_nearest() -> None:
    with pytest.raises(ValueError) as error:
        found(meta_model(), target_modules=["q_prj", "v_proj"])

    message = str(error.value)
    assert message.startswith(
        "adapter.target_modules=['q_prj', 'v_proj'] matches no linear layer (q_prj: 0, v_proj: 3)"
    )
    assert "nearest: q_proj" in message and "\n" not in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": "linear"}, r"adapter.target_modules='linear' matches no linear layer \(linear: 0\)"),
        ({"target_modules": []}, "adapter.target_modules=.*needs layers, such as all_linear"),
        ({"target_modules": None}, "adapter.target_modules=None"),
        ({"target_modules": "re:("}, r"'re:\(' is not a regular expression"),
        ({"exclude_modules": ["q_prok"]}, "adapter.exclude_modules: q_prok matches no layer; nearest: q_proj"),
        ({"exclude_modules": ["*_proj"]}, "leaves none of the layers matched"),
        ({"rank_pattern": {"lm_head": 3}}, "adapter.rank_pattern: lm_head matches no layer"),
        ({"alpha_pattern": {"nothing": 3.0}}, "adapter.alpha_pattern: nothing matches no layer"),
        ({"layers": "3-"}, "adapter.layers='3-': this model's blocks are 0-2$"),
        ({"layers": "0,1-9"}, "adapter.layers='0,1-9': this model's blocks are 0-2; 1- takes all from 1 on"),
        ({"layers": "a"}, "adapter.layers='a': write block numbers and ranges"),
        ({"layers": "4-2"}, "adapter.layers='4-2': 4-2 ends before it starts"),
    ],
)
def test_bad_selection_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        found(meta_model(), **options)


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_tied_embedding_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} shares its weight"):
        found(meta_model(tie_word_embeddings=True), target_modules=[name])
    assert leaves(meta_model(tie_word_embeddings=False), target_modules=[name]) == {name}


def test_rank_above_a_layer_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found(meta_model(), rank=48, target_modules="attention")

    assert [r.getMessage() for r in caplog.records] == [
        "rank 48 is above the smaller side of model.layers.0.self_attn.k_proj (32 x 64) and of 5 more layers: "
        "it works, at more parameters than the layer's own"
    ]


def test_rank_of_vera_above_a_layer_is_usual(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        find_targets(meta_model(), VeRAConfig(rank=256), tuple(METHODS["vera"].layers))

    assert not caplog.records


def test_rank_above_a_layer_is_an_error_for_spectral_starts() -> None:
    with pytest.raises(ValueError, match="adapter.rank=48: rank 48 is above the smaller side of .*k_proj"):
        found(meta_model(), rank=48, init="pissa")


def test_stacked_experts_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    model = meta_model("MixtralConfig")
    experts = 3 * 4 * 3 * 64 * 96
    attention = 3 * (2 * 64 * 64 + 2 * 32 * 64)
    share = experts / (experts + attention)

    found(model)

    assert expert_share(model) == pytest.approx(share)
    assert f"{100 * share:.1f} % of the linear weights are in stacked experts" in caplog.text


def test_a_method_without_a_form_for_experts_is_told_by_their_name() -> None:
    config = VeRAConfig(rank=4, target_modules=["gate_up_proj"])
    with pytest.raises(ValueError, match="the name belongs to stacked experts, which method vera does not adapt"):
        find_targets(meta_model("MixtralConfig"), config, tuple(METHODS["vera"].layers))


def test_table_has_a_row_per_kind_of_layer_and_the_totals() -> None:
    model = meta_model()
    config: AdapterConfig = LoRAConfig(rank=4, target_modules="query_value")
    targets = find_targets(model, config, tuple(METHODS["lora"].layers))
    inject_adapters(model, config)

    table = describe_targets(targets, model)

    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == ["model.layers.*.self_attn.q_proj", "model.layers.*.self_attn.v_proj"]
    assert [column[1] for column in cells[1:]] == ["3", "32 x 64", "4", "8", f"{3 * 4 * (32 + 64):,}"]
    assert str(table.caption).startswith(f"{3 * 4 * (128 + 96):,} of ")


def test_table_keeps_layers_of_other_ranks_apart() -> None:
    model = meta_model()
    config: AdapterConfig = LoRAConfig(
        rank=4, target_modules="query_value", rank_pattern={"layers.1.self_attn.q_proj": 2}
    )
    targets = find_targets(model, config, tuple(METHODS["lora"].layers))
    inject_adapters(model, config)

    table = describe_targets(targets, model)

    rows = list(zip(*(list(column.cells) for column in table.columns), strict=True))
    assert [(row[0].rpartition(".")[2], row[1], row[3]) for row in rows] == [
        ("q_proj", "2", "4"), ("v_proj", "3", "4"), ("q_proj", "1", "2"),
    ]  # fmt: skip
