"""Text for a model is text: `${`, quotes, commas and backslashes arrive in the run, its files and its adapter."""

import json

import pytest

from lightning_peft.__main__ import main
from lightning_peft.compose import compose_config
from lightning_peft.config import plain, train_config
from lightning_peft.data.config import DataConfig
from lightning_peft.data.mixture import sources_of
from lightning_peft.interpolation import escaped
from lightning_peft.words import everyday

HOSTILE = ["Costs ${5}", "${oc.env:HOME}", "a ${unclosed", "C:\\x\\", "{{x}} ${a.b}, 'q' \"d\" = ( ["]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("key", ["data.system_prompt", "data.sources.a.system_prompt"])
def test_text_of_a_prompt_is_taken_as_it_stands(key, text):
    words = ["model=tiny", "data.sources.a.train_path=a.jsonl", "data.sources.b.train_path=b.jsonl", f"{key}={text}"]
    config = compose_config("train", everyday("train", words))
    assert next(iter(sources_of(config.data))).config.system_prompt == text
    assert train_config(plain(config)) == config


@pytest.mark.parametrize("text", HOSTILE[2::2])
def test_text_is_kept_through_the_files_of_a_run(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt":"Hi","completion":"Hello"}\n' * 4)
    words = ["train", "model=tiny", "data=rows.jsonl", "trainer.max_steps=1", "data.validation_fraction=0",
             "data.max_length=512", "run_dir=run", f"data.system_prompt={text}"]  # fmt: skip
    assert main(words) == 0
    assert json.loads((tmp_path / "run/adapter/prompt_layout.json").read_text())["system_prompt"] == text
    assert compose_config("train", ["config_path=run/config.yaml"]).data.system_prompt == text
    assert main([*words, "resume=auto"]) == 0  # compared with what is on disk


@pytest.mark.slow
def test_text_with_a_reference_is_text_in_a_sweep_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt":"Hi","completion":"Hello"}\n' * 4)
    text = "You are: a ${5} (x)"
    words = ["train", "-m", "model=tiny", "data=rows.jsonl", "trainer.max_steps=1", "data.validation_fraction=0"]
    assert main([*words, "run_dir=sweep", "adapter.rank=2,4", f"data.system_prompt={text}"]) == 0
    kept = compose_config("train", ["config_path=sweep/rank4/config.yaml"])
    assert kept.data.system_prompt == text


@pytest.mark.parametrize("word", ["run_dir=${5}", "model.revision=${nope}", "run_dir=${oc.env:NOPE_AT_ALL}"])
def test_reference_to_nothing_is_named(word):
    with pytest.raises(ValueError) as wrong:
        compose_config("train", ["model=tiny", "data=jsonl", "data.train_path=x.jsonl", word])
    assert str(wrong.value).startswith(f"{word}: ")
    assert "${...} refers to another key" in str(wrong.value)


def test_option_that_refers_to_another_still_does():
    assert compose_config("train", ["model=tiny", "run_dir=runs/${seed}", "seed=7"]).run_dir == "runs/7"


def test_saved_config_reads_no_variable_of_the_environment(monkeypatch):
    monkeypatch.setenv("SECRET", "hidden")
    saved = plain(compose_config("train", ["model=tiny"]))
    saved["data"]["system_prompt"] = "${oc.env:SECRET}"
    assert train_config(saved).data.system_prompt == "${oc.env:SECRET}"


def test_source_of_a_mixture_keeps_shared_text():
    sources = {"a": {"train_path": "x", "system_prompt": "${6}"}, "b": {"train_path": "y"}}
    config = DataConfig(system_prompt="${5", sources=sources)
    assert [source.config.system_prompt for source in sources_of(config)] == ["${6}", "${5"]


def test_backslashes_before_a_reference_are_kept_in_saved_configs():
    saved = plain(compose_config("train", ["model=tiny"]))
    saved["data"]["system_prompt"] = "C:\\${x}\\\\${y}\\"
    assert plain(train_config(saved))["data"]["system_prompt"] == "C:\\${x}\\\\${y}\\"


def test_escaped_leaves_what_is_no_text():
    assert escaped({"a": [1, None, "${x}"]}) == {"a": [1, None, "\\${x}"]}
