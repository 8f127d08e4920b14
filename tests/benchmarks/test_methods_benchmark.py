"""The table of methods is filled row by row and goes on where it was stopped."""

import json

import pytest

from benchmarks.methods import METHODS, learning_rate, main, measure_quality
from benchmarks.results import Results
from lightning_peft.compose import compose_config
from lightning_peft.schemas import CONF_DIR


def test_every_method_is_an_option():
    assert set(METHODS) <= {path.stem for path in (CONF_DIR / "method").glob("*.yaml")}


def test_learning_rate_of_lora_is_its_recipes():
    assert learning_rate("lora") == compose_config("train", ["recipe=lora/text_to_sql"]).optimizer.lr


def test_rows_come_back_and_other_settings_are_refused(tmp_path):
    path = tmp_path / "methods.json"
    Results(path, {"steps": 2}).add("lora", {"validation_loss": 1.0})
    assert Results(path, {"steps": 2}).rows == {"lora": {"validation_loss": 1.0}}
    with pytest.raises(ValueError, match="give the same settings"):
        Results(path, {"steps": 3})


def test_failed_method_is_reported_and_leaves_no_row(tmp_path, capfd, forked_starts):
    results = Results(tmp_path / "methods.json", {})
    assert measure_quality(["lora"], results, steps=2, rows=4, model="no_such_model") == ["lora"]
    assert "no_such_model: no such option" in capfd.readouterr().err
    assert results.rows == {}


@pytest.mark.slow
def test_methods_are_trained_and_scored_once(tmp_path, capfd, forked_starts):
    words = ["--model", "tiny", "--steps", "2", "--rows", "4", "--output", f"{tmp_path}/methods.json"]
    assert main([*words, "--methods", "lora", "full"]) == 0
    rows = json.loads((tmp_path / "methods.json").read_text())["rows"]
    assert set(rows) == {"base", "lora", "full"}
    assert rows["full"]["trainable_parameters"] > rows["lora"]["trainable_parameters"] > 0
    assert 0 < rows["lora"]["validation_loss"] < rows["base"]["validation_loss"]
    assert main([*words, "--methods", "lora", "full"]) == 0
    assert "full: measured before" in capfd.readouterr().out
