"""Rows without an answer are asked as training rows are trained: the tokens before the answer are the same."""

import json
import re

import pytest
from chat_templates import TRL
from test_samples import run

from lightning_peft.commands.generate import Prompt
from lightning_peft.data.config import Layout
from lightning_peft.data.conversation import BadRow, Row
from lightning_peft.data.layout import PromptLayout
from lightning_peft.data.prompt_rows import prompts_of, read_prompt
from lightning_peft.models.tiny import tiny_tokenizer

TOOL = {"type": "function", "function": {"name": "weather", "description": "Weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}}}}  # fmt: skip
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "?"}]
ROWS = {
    "prompt": {"prompt": "Translate"},
    "input": {"prompt": "Translate", "input": "chat"},
    "system": {"prompt": "Translate", "system": "You are a pirate."},
    "history": {"prompt": "Translate", "history": [["Hi", "Hello"], ["a", "b"]]},
    "history of turns": {"prompt": "Translate", "history": TURNS[:2]},
    "tools": {"prompt": "Translate", "tools": [TOOL]},
    "tools as JSON": {"prompt": "Translate", "tools": json.dumps([TOOL])},
    "all": {"prompt": "Go", "input": "chat", "system": "Be brief", "history": [["a", "b"]], "tools": [TOOL]},
    "turns": {"messages": TURNS, "system": "You are a pirate.", "tools": [TOOL]},
    "turns as JSON": {"messages": json.dumps(TURNS)},
    "prompt of turns": {"prompt": TURNS, "system": "Be brief"},
    "weights": {"prompt": "Translate", "weight": 0.5},
}


@pytest.fixture(scope="module")
def qwen3():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (TRL / "qwen3.jinja").read_text()
    return tokenizer


def with_answer(row):
    if "messages" not in row:
        return row | {"completion": "Yes"}
    turns = json.loads(row["messages"]) if isinstance(row["messages"], str) else row["messages"]
    return row | {"messages": [*turns, {"role": "assistant", "content": "Yes"}]}


def asked(row, tokenizer, layout=None):
    layout = layout or PromptLayout(template=tokenizer.chat_template)
    found = read_prompt(Row(row, "prompts.jsonl line 1"), layout.kind != "chat")
    return prompts_of([Prompt(row, found).conversation(layout)], layout, tokenizer)[0]


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_prompt_is_what_stands_before_the_answer_in_training(row, qwen3):
    samples, _ = run([with_answer(row)], qwen3, max_length=2000)
    sample = samples[-1]
    trained = [place for place, label in enumerate(sample.labels) if label != -100]
    last = next(place for place in reversed(trained) if place - 1 not in trained)
    found = asked(row, qwen3)
    assert found == sample.input_ids[:last]
    for said in re.findall(r"pirate|brief|chat|weather", json.dumps(row)):
        assert said in qwen3.decode(found)


def test_input_is_continued_as_in_training_without_turns(qwen3):
    row = {"prompt": "Translate", "input": "chat"}
    samples, _ = run([row | {"completion": " Yes"}], qwen3, layout=Layout.raw)
    first = next(place for place, label in enumerate(samples[0].labels) if label != -100)
    assert asked(row, qwen3, PromptLayout(kind="raw")) == samples[0].input_ids[:first]


def test_text_that_looks_like_turns_is_text_without_turns(qwen3):
    text = json.dumps(TURNS[:2])
    assert asked({"prompt": text}, qwen3, PromptLayout(kind="text")) == qwen3(text)["input_ids"]


BAD = {
    "both": ({"prompt": "a", "messages": TURNS}, "text under prompt, or turns under messages, not both"),
    "input beside turns": ({"messages": TURNS, "input": "x"}, "column 'input': expected no input beside the turns"),
    "input beside a prompt of turns": ({"prompt": TURNS, "input": "x"}, "no input beside the turns of prompt"),
    "history beside turns": ({"messages": TURNS, "history": [["a", "b"]]}, "no history beside the turns of messages"),
    "two system prompts": (
        {"messages": [{"role": "system", "content": "a"}, *TURNS], "system": "b"},
        "column 'system': expected one system message",
    ),
    "unread key": ({"messages": [{**TURNS[0], "mask": 1}]}, "nobody reads key 'mask' of a turn"),
    "answered": ({"prompt": TURNS[:2]}, "its prompt ends in an answer"),
    "bad tools": ({"prompt": "a", "tools": "{"}, "column 'tools': expected JSON"),
    "half a character": ({"prompt": "cut \ud83d"}, "expected UTF-8 text, got half of a surrogate pair"),
    "half a character in the system prompt": ({"prompt": "a", "system": "cut \ud83d"}, "expected UTF-8 text"),
}


@pytest.mark.parametrize(("row", "message"), BAD.values(), ids=BAD)
def test_row_that_asks_nothing_readable_is_named(row, message, qwen3):
    with pytest.raises(BadRow, match=f"^prompts.jsonl line 1.*{re.escape(message)}"):
        asked(row, qwen3)


@pytest.mark.parametrize(
    ("row", "has"),
    [
        ({"prompt": "a", "system": "b"}, "system"),
        ({"prompt": "a", "tools": [TOOL]}, "tools"),
        ({"prompt": "a", "history": [["a", "b"]]}, "history"),
        ({"messages": TURNS[:1]}, "turns under messages"),
        ({"prompt": TURNS[:1]}, "turns under prompt"),
    ],
)
def test_adapter_without_turns_is_asked_no_turns(row, has, qwen3):
    with pytest.raises(BadRow, match=f"line 1: has {has}, and the adapter was trained on text without turns"):
        asked(row, qwen3, PromptLayout(kind="raw"))


def test_prompt_that_the_template_refuses_names_its_row(qwen3):
    refusing = (
        "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}" + "{% for m in messages %}"
    )
    refusing += "{{ m.content }}{% endfor %}"
    layout = PromptLayout(template=refusing)
    with pytest.raises(BadRow, match="^prompts.jsonl line 1: the chat template refuses .*one turn only"):
        asked({"messages": TURNS}, tiny_tokenizer(), layout)


@pytest.mark.parametrize("kind", ["chat", "raw", "text"])
def test_half_a_character_in_a_prompt_is_one_line(kind, qwen3):
    layout = PromptLayout(kind=kind)
    with pytest.raises(ValueError, match="^expected UTF-8 text, got half of a surrogate pair"):
        layout.prompt(layout.conversation("cut \ud83d"), qwen3)


def test_other_columns_are_listed_and_kept():
    row = {"id": 3, "prompt": "a", "context": "c", "completion": "b", "input": None}
    found = read_prompt(Row(row, "line 1"))
    assert {*found.unread, *found.listed} == {"column 'id'", "column 'context'", "column 'completion'"}
