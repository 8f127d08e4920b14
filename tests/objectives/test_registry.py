"""The table of objectives: its facts about each, and the words it gives the command line."""

import pytest

from lightning_peft.commands.completion import all_words
from lightning_peft.commands.schema import schema_of_file
from lightning_peft.compose import compose_config
from lightning_peft.config import plain, train_config
from lightning_peft.data.config import RowKind
from lightning_peft.help import command_help
from lightning_peft.objectives.registry import OBJECTIVES
from lightning_peft.options import field_docs, options_of
from lightning_peft.schemas import CONF_DIR


@pytest.mark.parametrize("name", OBJECTIVES)
def test_row_has_options_with_docstrings_and_an_option_file(name):
    row = OBJECTIVES[name]
    assert row.config().name == name and row.formula
    assert all(field_docs(row.config)[option.key] for option in options_of(row.config))
    assert (CONF_DIR / "objective" / f"{name}.yaml").is_file()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_chosen_objective_decides_the_rows_and_reads_back_equal(name):
    config = compose_config("train", ["model=tiny", f"objective={name}", "run_dir=runs/x"])
    assert type(config.objective) is OBJECTIVES[name].config and config.data.rows is OBJECTIVES[name].rows
    assert train_config(plain(config)) == config


@pytest.mark.parametrize("name", OBJECTIVES)
def test_help_schema_and_completion_name_it(name):
    assert name in command_help("train", ["objective"])
    assert f"objective={name}" in all_words()
    assert name in schema_of_file()["properties"]["objective"]["anyOf"][0]["enum"]


def test_unknown_objective_is_answered_with_those_there_are():
    with pytest.raises(ValueError, match=r"objective=ppo: no such option; .*objective is one of .*sft"):
        compose_config("train", ["objective=ppo"])
    with pytest.raises(ValueError, match="objective.name=ppo: must be one of .*sft"):
        compose_config("train", ["objective.name=ppo"])


def test_rows_that_another_objective_takes_are_refused():
    with pytest.raises(ValueError, match="data.rows=pairs: objective=sft takes answers; leave it out"):
        compose_config("train", ["data.rows=pairs"])
    assert compose_config("train", []).data.rows is RowKind.answers
