"""`lightning-peft models`: the record of the families, asked for by name, folder and option."""

from pathlib import Path

import pytest
from transformers import Gemma3Config, Qwen3VLConfig

from lightning_peft.__main__ import main
from lightning_peft.models.families import CHECKS, COLUMNS, Family, families, in_short


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["models", *words]) == 0
    return capsys.readouterr().out


def test_every_family_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said([], capsys).splitlines()
    assert lines[0].split() == ["family", *COLUMNS]
    assert [line.split()[0] for line in lines[1:-1]] == list(families())
    assert f"{len(families())} families with transformers {families()['llama'].transformers}" in lines[-1]


def test_a_family_has_every_check_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(said(["gpt_oss"], capsys).split())
    assert all(check in text for check in CHECKS)
    assert "pack refused its samples would see each other" in text
    assert "gpt_oss, on a small random model, with transformers" in text


@pytest.mark.parametrize(("config", "family"), [(Gemma3Config(), "gemma3_text")])
def test_a_folder_is_asked_for_by_its_config(
    config: Gemma3Config, family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.save_pretrained(tmp_path)
    assert f"{family}, on a small random model" in said([str(tmp_path)], capsys)


def test_a_family_that_was_not_verified_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Qwen3VLConfig().save_pretrained(tmp_path)
    assert f"qwen3_vl is none of the {len(families())} families verified" in said([str(tmp_path)], capsys)


def test_options_of_model_have_a_family(capsys: pytest.CaptureFixture[str]) -> None:
    assert "llama, on a small random model" in said(["tiny"], capsys)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["gptoss"], "models: gptoss is no family, folder, hub id or option of model=; near it are gpt_oss"),
        (["llama", "qwen2"], "models: takes one family, folder, hub id or option of model= at most, not llama qwen2"),
        (["model=llama"], "models: takes one family"),
        (["./nowhere"], "model.path=./nowhere: no such file or folder"),
    ],
)
def test_what_is_no_model_is_one_line(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", *words]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert line in error


def test_a_column_names_what_passed_of_it() -> None:
    cells = dict.fromkeys(CHECKS, "ok") | {"gguf": "refused so", "pack": "refused so", "experts": "-"}
    family = Family("some", "5", cells)
    found = {column: in_short(family, column) for column in ("train", "pack", "experts", "GGUF")}
    assert found == {"train": "yes", "pack": "no", "experts": "-", "GGUF": "gguf_lora"}
