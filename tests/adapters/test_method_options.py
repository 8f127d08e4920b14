"""The option files of methods, adapters, ranks and targets compose to what they say."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_peft.adapters.base import AdapterConfig
from lightning_peft.adapters.layer_names import PRESETS
from lightning_peft.adapters.registry import METHODS
from lightning_peft.compose import compose_config

CONF = Path(__file__).parents[2] / "conf"
VARIANTS: dict[str, dict[str, Any]] = {
    "qlora": {"adapter.method": "lora", "quantization.kind.name": "nf4"},
    "qdora": {"adapter.method": "dora", "quantization.kind.name": "nf4"},
    "rslora": {"adapter.method": "lora", "adapter.rank_stabilized": True},
    "lora_plus": {"adapter.method": "lora", "optimizer.lora_plus_ratio": 16},
    "pissa": {"adapter.method": "lora", "adapter.init": "pissa"},
    "olora": {"adapter.method": "lora", "adapter.init": "olora"},
    "eva": {"adapter.method": "lora", "adapter.init": "eva"},
    "loftq": {"adapter.method": "lora", "adapter.init": "loftq", "quantization.kind.name": "nf4"},
}
"""Option files that are a method of the table with a choice of their own."""


def own_options(method: str) -> dict[str, Any]:
    """Return what the option file of a method of the table leaves in place: the defaults of its config's own fields."""
    config = METHODS[method].config
    shared = {field.name for field in fields(AdapterConfig)}
    names = {field.name for field in fields(config) if field.name not in shared} | {"method", "target_modules"}
    if not config.uses_rank or not config.rank_costs_parameters:  # the other methods take the group's r16
        names.add("rank")
    return {f"adapter.{name}": getattr(config(), name) for name in names}


EXPECTED = {**{method: own_options(method) for method in METHODS}, **VARIANTS}


def value(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


def options(group: str) -> set[str]:
    return {path.stem for path in (CONF / group).glob("*.yaml")}


@pytest.mark.parametrize("method", EXPECTED)
def test_method_sets_what_it_says(method: str) -> None:
    config = compose_config("train", [f"method={method}"])

    wanted = {"quantization.kind.name": "none", "optimizer.lora_plus_ratio": None, **EXPECTED[method]}
    assert {path: value(config, path) for path in wanted} == wanted
    assert type(config.adapter) is METHODS[config.adapter.method].config


def test_every_method_option_is_expected_here() -> None:
    assert options("method") == set(EXPECTED)


def test_every_preset_is_an_option() -> None:
    assert options("target_modules") == set(PRESETS) | {"none"}


@pytest.mark.parametrize("name", sorted(options("rank") - {"method", "none", "tapered"}))
def test_rank_option_is_its_name(name: str) -> None:
    assert yaml.safe_load((CONF / "rank" / f"{name}.yaml").read_text()) == {"rank": int(name.removeprefix("r"))}


def test_tapered_rank_costs_as_much_as_the_default() -> None:
    adapter = compose_config("train", ["rank=tapered"]).adapter

    assert (adapter.rank + adapter.rank_last) / 2 == compose_config("train", []).adapter.rank


@pytest.mark.parametrize(
    ("overrides", "path", "expected"),
    [
        (["method=vera", "rank=r64"], "adapter.rank", 64),
        (["method=lora_plus", "optimizer=adamw_8bit"], "optimizer.lora_plus_ratio", 16),
        (["method=qlora", "quantization=none"], "quantization.kind.name", "none"),
        (["method=ia3", "target_modules=attention"], "adapter.target_modules", "attention"),
        (["method=dora", "optimizer.lr=0.5"], "optimizer.lr", 0.5),
        (["method=lora", "adapter.target_modules=[q_proj,v_proj]"], "adapter.target_modules", ["q_proj", "v_proj"]),
    ],
)
def test_typed_choice_wins_over_the_method(overrides: list[str], path: str, expected: Any) -> None:
    assert value(compose_config("train", overrides), path) == expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=ia3", "rank=r8"], "adapter.rank=8: method 'ia3' has no rank; use rank=none"),
        (["method=full", "rank=r8"], "adapter.rank=8: method 'full' has no rank; use rank=none"),
        (["method=full", "target_modules=mlp"], "adapter.target_modules='mlp': method full trains every weight"),
        (["method=lora", "rank=none"], "adapter.rank=null: method 'lora' needs a rank"),
        (["method=vera", "adapter.alpha=8"], "adapter.alpha=8.0: method 'vera' has no scaling"),
        (["adapter.rank=0"], "adapter.rank=0: a rank is at least 1"),
    ],
)
def test_choice_a_method_cannot_have_is_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose_config("train", overrides)


@pytest.mark.parametrize("path", sorted((CONF / "method").glob("*.yaml")), ids=lambda path: path.stem)
def test_method_option_is_short_and_sets_a_learning_rate(path: Path) -> None:
    text = path.read_text()

    assert text.startswith("# @package _global_\n") and len(text.splitlines()) <= 15
    assert 1e-5 <= yaml.safe_load(text)["optimizer"]["lr"] <= 1e-2
