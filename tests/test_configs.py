"""Every option file composes to a typed config, alone and for every method."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import DictConfig, FloatNode, OmegaConf

from lightning_peft.adapters.lora import LoRAConfig
from lightning_peft.adapters.registry import METHODS
from lightning_peft.checkpoint.merge_config import MergeConfig
from lightning_peft.compose import compose_config, composed, quote_text_values, typed
from lightning_peft.config import plain, train_config
from lightning_peft.inference.sampling import SamplingConfig
from lightning_peft.objectives.kto import KTOConfig
from lightning_peft.objectives.sft import SFTConfig
from lightning_peft.optim.optimizers import OPTIMIZERS, OptimizerConfig
from lightning_peft.schemas import CONF_DIR, trial_name
from lightning_peft.training.config import EarlyStoppingConfig, GuardConfig

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


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["method=dora", "model=tiny"], "dora-tiny"),
        (["method=qlora", "model=llama_3_1_8b"], "qlora-llama_3_1_8b"),
        (["method=pissa", "model=hf", "model.path=Qwen/Qwen2.5-0.5B"], "pissa-Qwen2.5-0.5B"),
        (["model=hf", "model.path=/models/my model.gguf"], "lora-my-model"),
        (["model=hf", "model.path=org/name", "model.label=mine"], "lora-mine"),
    ],
)
def test_run_is_named_by_method_and_model(words, name):
    config = compose_config("train", [*words, "logger=wandb"])
    assert config.run_dir.endswith(f"-{name}")
    assert "-".join(config.logger["wandb"]["default_tags"]) == name
    assert Path(compose_config("submit", words).run_dir).name.startswith(f"{name}-")


@pytest.mark.parametrize(("method", "rank"), [("vera", 256), ("adalora", 12), ("lora", 16), ("full", None)])
def test_rank_is_the_methods_own(method, rank):
    assert compose_config("train", [f"method={method}"]).adapter.rank == rank


def test_adapter_without_its_method_is_refused():
    with pytest.raises(ValueError, match="adapter=vera: use method=vera, which also sets what goes with it"):
        compose_config("train", ["adapter=vera"])


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
        ("adapter.target_modules=[a b]", "target_modules-a-b--8df4"),
        ("", "trial"),
    ],
)
def test_trial_names_hold_no_equals_sign_and_no_comma(overrides, name):
    assert trial_name(overrides) == name


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("adapter.rank_pattern={q_proj:8}", {"q_proj": 8}),
        ("adapter.rank_pattern={layers.1.*:8,v_proj:2}", {"layers.1.*": 8, "v_proj": 2}),
        ("adapter.rank_pattern={re\\:.*q_proj:8}", {"re:.*q_proj": 8}),
        ("adapter.rank_pattern.q_proj=8", {"q_proj": 8}),
        ("+adapter.rank_pattern.q_proj=8", {"q_proj": 8}),
    ],
)
def test_patterns_are_given_on_the_command_line(word, expected):
    config = compose_config("train", ["model=tiny", "run_dir=runs/x", word])
    assert config.adapter.rank_pattern == expected and config.adapter.alpha_pattern == {}


def test_other_dictionaries_take_new_keys_and_dataclasses_none():
    words = ["model=tiny", "run_dir=runs/x", "data.template_options={enable_thinking:false}"]
    assert compose_config("train", words).data.template_options == {"enable_thinking": False}
    for word in ("adapter.rank_patern={q_proj:8}", "+adapter.rank_patern.q_proj=8", "data.template_option.a=1"):
        with pytest.raises(ValueError, match="no such option"):
            compose_config("train", [*words, word])


def float_keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in map(str, config):
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none():
            yield from float_keys(node, f"{prefix}{key}.")
        elif isinstance(node, FloatNode):
            yield f"{prefix}{key}"


@pytest.mark.parametrize("words", [["method=adalora", "objective=dpo"], ["method=balora"]], ids=" ".join)
def test_numbers_that_are_not_finite_are_refused(words):
    whole = composed("train", ["model=tiny", *words])
    keys = list(float_keys(whole))
    assert {"optimizer.lr", "guard.factor", "schedule.min_lr_ratio"} <= {*keys}
    for key in keys:
        for value in (math.nan, math.inf):
            config = copy.deepcopy(whole)
            OmegaConf.update(config, key, value)
            with pytest.raises(ValueError, match=rf"^{key}={value}: must be a finite number$"):
                typed(config)


def test_nan_is_refused_in_open_dictionaries_and_in_saved_configs():
    for words in (
        ["trainer.gradient_clip_val=nan"],
        ["data.sources.a.weight=nan"],
        ["adapter.alpha_pattern={q: .nan}"],
    ):
        with pytest.raises(ValueError, match="nan"):
            compose_config("train", ["model=tiny", *words])
    saved = plain(compose_config("train", ["model=tiny"]))
    saved["objective"]["noise_alpha"] = math.nan
    with pytest.raises(ValueError, match="objective.noise_alpha=nan: must be a finite number"):
        train_config(saved)
    assert compose_config("train", ["model=tiny", "trainer.gradient_clip_val=inf"]).trainer["gradient_clip_val"] > 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: GuardConfig(factor=math.nan),
        lambda: EarlyStoppingConfig(min_delta=math.nan),
        lambda: SFTConfig(noise_alpha=math.nan),
        lambda: KTOConfig(desirable_weight=math.nan),
        lambda: OptimizerConfig(name="adamw", lr=math.nan),
        lambda: OptimizerConfig(name="adamw", weight_decay=math.nan),
        lambda: SamplingConfig(temperature=math.nan),
        lambda: LoRAConfig(rank=4, alpha=math.nan),
        lambda: MergeConfig(max_kl=math.nan),
    ],
)
def test_ranges_are_checked_so_that_nan_is_outside(make):
    with pytest.raises(ValueError, match="=nan: must be "):
        make()
