"""The words of a card, from the files beside it."""

import json

import pytest

from lightning_peft.checkpoint.lineage import Lineage, write_lineage
from lightning_peft.checkpoint.model_card import write_card


def card(folder, layout, **lineage):
    write_lineage(Lineage("0" * 64, "org/name", **lineage), folder)
    (folder / "prompt_layout.json").write_text(json.dumps({"kind": "chat", "system_prompt": None} | layout))
    write_card(folder)
    return (folder / "README.md").read_text()


def test_card_does_not_say_that_rows_had_no_system_message(tmp_path):
    """The layout knows the prompt that was put before rows, and not what they began with themselves."""
    said = card(tmp_path, {})
    assert "Rows that began with a system message were trained with it" in said
    assert "with no system prompt" not in said


def test_card_holds_the_system_prompt_that_was_put_before_rows(tmp_path):
    said = card(tmp_path, {"system_prompt": "Be brief."})
    assert "```text\nBe brief.\n```" in said and "Rows that began" not in said


@pytest.mark.parametrize("commands", [[], ["lightning-peft train a.yaml", "lightning-peft train a.yaml resume=auto"]])
def test_card_holds_the_commands_of_the_run(tmp_path, commands):
    said = card(tmp_path, {}, commands=commands)
    assert ("## Commands" in said) is bool(commands)
    assert all(f"\n{command}\n" in said for command in commands)
