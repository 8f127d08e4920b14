import pytest

from lightning_peft.data.config import DataConfig, Format
from lightning_peft.data.conversation import TEXT_ROLE, BadRow, Message, Row
from lightning_peft.data.formats import check_format
from lightning_peft.data.row_reader import row_reader

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SHAREGPT = [
    {"from": "system", "value": "Be brief"},
    {"from": "human", "value": "Hi"},
    {"from": "gpt", "value": "Hello"},
]
HI = [Message("user", "Hi"), Message("assistant", "Hello")]
SHAPES = {
    "messages": ({"messages": CHAT}, Format.messages, HI),
    "conversations": ({"conversations": SHAREGPT}, Format.messages, [Message("system", "Be brief"), *HI]),
    "instruction": ({"instruction": "Hi", "input": "", "output": "Hello", "text": "x"}, Format.instruction, HI),
    "instruction with input": (
        {"instruction": "Add", "input": "1, 2", "output": "3"},
        Format.instruction,
        [Message("user", "Add\n\n1, 2"), Message("assistant", "3")],
    ),
    "prompt_completion": ({"prompt": "Hi", "completion": "Hello", "level": 2}, Format.prompt_completion, HI),
    "text": ({"text": "Hi Hello"}, Format.text, [Message(TEXT_ROLE, "Hi Hello")]),
}


def read(values, **options):
    return row_reader(values, DataConfig(**options))(Row(values, "rows.jsonl line 3"))


@pytest.mark.parametrize("name", SHAPES)
def test_shape_is_found_by_columns(name):
    values, format, messages = SHAPES[name]
    assert row_reader(values, DataConfig()).format is format
    assert read(values) == messages


def test_columns_are_renamed():
    assert read({"question": "Hi", "answer": "Hello"}, prompt_column="question", completion_column="answer") == HI
    assert read({"chat": CHAT}, messages_column="chat") == HI
    assert read({"body": "Hi"}, text_column="body") == [Message(TEXT_ROLE, "Hi")]


def test_format_option_decides_where_two_fit():
    assert read({"text": "all", "prompt": "Hi", "completion": "Hello"}, format=Format.text) == [
        Message(TEXT_ROLE, "all")
    ]


def test_system_prompt_goes_before_rows_without_one():
    assert read({"messages": CHAT}, system_prompt="Be kind")[0] == Message("system", "Be kind")
    assert read({"conversations": SHAREGPT}, system_prompt="Be kind")[0] == Message("system", "Be brief")
    assert read({"text": "Hi"}, system_prompt="Be kind") == [Message(TEXT_ROLE, "Hi")]


REFUSED_OPTIONS = {
    "column that is not there": (
        {"prompt_column": "q"},
        "data.prompt_column=q: the rows have no such column, only question, answer",
    ),
    "second column missing": (
        {"prompt_column": "question"},
        "data.format=prompt_completion: needs a column question and completion; the rows have question, answer",
    ),
    "format does not fit": (
        {"format": Format.messages},
        "data.format=messages: needs a column messages or conversations; the rows have question, answer",
    ),
    "unknown shape": ({}, "data.format=auto: no known shape of row, the columns are question, answer; name two"),
    "two formats": (
        {"format": Format.text, "prompt_column": "question"},
        r"data.format=text and data.prompt_column: these belong to different formats \(prompt_completion, text\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED_OPTIONS)
def test_options_that_do_not_fit_are_named(name):
    options, message = REFUSED_OPTIONS[name]
    with pytest.raises(ValueError, match=message):
        row_reader({"question": "Hi", "answer": "Hello"}, DataConfig(**options))


REFUSED_ROWS = {
    "number": ({"prompt": "Hi", "completion": 42}, r"column 'completion': expected non-empty text, got 42 \(int\)"),
    "null": ({"prompt": None, "completion": "a"}, "column 'prompt': expected non-empty text, got None"),
    "blank": ({"prompt": "Hi", "completion": " \n"}, r"column 'completion': expected non-empty text, got ' \\n'"),
    "input": ({"instruction": "a", "output": "b", "input": 3}, r"column 'input': expected text, got 3 \(int\)"),
    "not a list": ({"messages": "Hi"}, "column 'messages': expected a list of messages, got 'Hi'"),
    "no messages": ({"messages": []}, r"expected a list of messages, got \[\] \(list\)"),
    "no role": ({"messages": [{"content": "a"}]}, "expected messages with role and content"),
    "role": ({"messages": [{"role": "critic", "content": "a"}]}, "expected a role among system, .* got 'critic'"),
    "content": (
        {"messages": [CHAT[0], {"role": "assistant", "content": None}]},
        "expected non-empty text as content of each assistant message, got None",
    ),
    "no answer": ({"messages": CHAT[:1]}, "expected at least one assistant message, got 'user'"),
    "answer first": ({"messages": CHAT[::-1]}, "expected a user message before the first assistant message"),
}


@pytest.mark.parametrize("name", REFUSED_ROWS)
def test_bad_row_names_place_expected_and_got(name):
    values, message = REFUSED_ROWS[name]
    with pytest.raises(BadRow, match=f"^rows.jsonl line 3, {message}|^rows.jsonl line 3, column 'messages': {message}"):
        read(values)


def test_missing_column_in_a_later_row_is_named():
    reader = row_reader({"prompt": "Hi", "completion": "Hello"}, DataConfig())
    with pytest.raises(BadRow, match="^a line 9: expected a column 'completion', got 'prompt, answer'$"):
        reader(Row({"prompt": "Hi", "answer": "Hello"}, "a line 9"))


def test_long_values_are_shortened():
    with pytest.raises(BadRow) as caught:
        read({"messages": "x" * 1000})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("name", "ours"),
    [("sharegpt", "messages"), ("Alpaca", "instruction"), ("chat_template", "messages"), ("dpo", "preference"),
     ("chat_template.argilla", "messages"), ("completion", "text")],
)  # fmt: skip
def test_format_by_another_tools_name_is_answered_with_ours(name, ours):
    with pytest.raises(ValueError, match=f"^data.format={name}: no such format; use data.format={ours}, or choose one"):
        check_format(name)


@pytest.mark.parametrize("options", [{"prompt_column": "a", "completion_column": "a"}, {"prompt_column": "completion"}])
def test_one_column_cannot_be_prompt_and_answer(options):
    with pytest.raises(ValueError, match="data.prompt_column and data.completion_column: name column '.*' for two"):
        row_reader(["a", "completion"], DataConfig(**options))
