"""Every option file composes to a typed config, alone and for every method."""

import pytest

from lightning_peft.adapters.registry import METHODS
from lightning_peft.compose import compose_config, quote_text_values
from lightning_peft.config import CONF_DIR, plain, train_config, trial_name
from lightning_peft.optim.optimizers import OPTIMIZERS

OPTIONS = [
    f"{path.parent.relative_to(CONF_DIR)}={path.stem}"
    for path in sorted(CONF_DIR.glob("*/*.yaml"))
    if path.parent.name not in ("recipe", "adapter")
]


@pytest.mark.parametrize("option", OPTIONS)
def test_option_composes(option):
    needs = {"rank=none": ["method=ia3"], "model=hf": ["model.path=folder"]}
    config = compose_config("train", [*needs.get(option, []), option])
    assert config.adapter.method in METHODS and config.optimizer.name in OPTIMIZERS


def test_saved_config_reads_back_equal():
    config = compose_config("train", ["method=vera", "quantization=nf4", "optimizer=adamw_8bit", "model=tiny"])
    assert train_config(plain(config)) == config


def test_what_the_user_types_wins_over_the_method():
    config = compose_config("train", ["method=lora_plus", "optimizer=adamw_8bit", "adapter.rank=3", "optimizer.lr=0.5"])
    assert (config.optimizer.name, config.adapter.rank, config.optimizer.lr) == ("adamw_8bit", 3, 0.5)
    assert config.optimizer.lora_plus_ratio == 16


def test_run_dir_names_method_and_model():
    assert compose_config("train", ["method=dora", "model=tiny"]).run_dir.endswith("-dora-tiny")


TEXTS = ["What's 1 + 1, and why?", 'say "hi"', "a=b", "(open", "{curly", "[list", "$HOME 50 %", "back\\slash", "tail\\"]


@pytest.mark.parametrize("text", TEXTS)
def test_prompts_need_no_escaping(text):
    assert compose_config("generate", ["model=tiny", f"prompt={text}"]).prompt == text


def test_paths_are_taken_verbatim():
    config = compose_config("train", ["data.train_path=/a b/c,d=(1).jsonl", "run_dir=runs/x=1,y"])
    assert (config.data.train_path, config.run_dir) == ("/a b/c,d=(1).jsonl", "runs/x=1,y")


def test_quoted_and_empty_values_are_left_alone():
    words = ["prompt='quoted'", "output=null", "adapter.rank=4", "data.train_path="]
    assert quote_text_values(words) == words


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ("adapter.rank=4,adapter.alpha=16", "rank4_alpha16"),
        ("method=dora,optimizer.lr=1e-3", "methoddora_lr1e-3"),
        ("adapter.target_modules=[a b]", "target_modules-a-b-"),
        ("", "trial"),
    ],
)
def test_trial_names_hold_no_equals_sign_and_no_comma(overrides, name):
    assert trial_name(overrides) == name
