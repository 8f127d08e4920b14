"""Rows as people bring them, through the command: each is read, or refused in one line with its place."""

import json

import pytest

from lightning_peft.__main__ import main

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
PAIR = {"prompt": "Hi", "completion": "Hello"}
CALL = {"id": "x", "type": "function", "function": {"name": "w", "arguments": "{bad"}}


def chat(*turns, **columns):
    return {"messages": list(turns), **columns}


READ = {
    "score that is NaN": '{"prompt":"Hi","completion":"a","score":NaN}',
    "id of 400 digits": '{"prompt":"Hi","completion":"a","id":' + "9" * 400 + "}",
    "mark and CRLF": '\ufeff{"prompt":"Hi","completion":"a"}\r',
    "roles in capitals": chat({"role": "User", "content": "Hi"}, {"role": "Assistant", "content": "Hello"}),
    "content in parts": chat({"role": "user", "content": [{"type": "text", "text": "Hi"}]}, ANSWER),
    "turns spelled in two ways": {"conversations": [{"from": "human", "value": "Hi"}, ANSWER]},
    "what the API adds and is empty": chat(USER, {**ANSWER, "refusal": None, "annotations": [], "tool_calls": None}),
    "history as turns": {"instruction": "Hi", "output": "x", "history": [USER, ANSWER]},
    "no tools": chat(USER, ANSWER, tools=[]),
    "weight in text": {**PAIR, "weight": "0.5"},
}
REFUSED = {
    "weight that is NaN": (
        '{"prompt":"Hi","completion":"a","weight":NaN}',
        "column 'weight': expected a number from 0",
    ),
    "id of 5000 digits": ('{"prompt":"Hi","completion":"a","id":' + "9" * 5000 + "}", "Exceeds the limit"),
    "a key twice": ('{"prompt":"Hi","completion":"a","completion":"b"}', "key 'completion' twice in one object"),
    "brackets in brackets": ('{"prompt":"Hi","completion":"a","meta":' + "[" * 3000 + "]" * 3000 + "}", "recursion"),
    "half a character": ('{"prompt":"cut \\ud83d","completion":"ok"}', "half of a surrogate pair"),
    "an array in a line": ([PAIR], "expected a JSON object, got [{"),
    "a comma at the end": (json.dumps(PAIR) + ",", "Extra data, column"),
    "null as an answer": (
        chat(USER, {**ANSWER, "content": None}),
        "non-empty text as content of each assistant message",
    ),
    "a number as a question": (chat({**USER, "content": 5}, ANSWER), "as content of each user message, got 5 (int)"),
    "an image": (chat({**USER, "content": [{"type": "image_url", "image_url": {}}]}, ANSWER), "parts of type text"),
    "images beside": (chat(USER, ANSWER, images=["a.png"]), "nobody reads column 'images'"),
    "an unknown role": (chat({**USER, "role": "narrator"}, ANSWER), "got 'narrator'"),
    "a role that is a list": (chat({**USER, "role": ["user"]}, ANSWER), "got ['user']"),
    "a turn without a role": (chat({"content": "x"}, ANSWER), "expected messages with role and content"),
    "an answer first": (chat(ANSWER, USER), "expected a user message before the first assistant message"),
    "nothing to train": (chat(USER, {**ANSWER, "weight": 0}), "expected an answer to train, got weight 0"),
    "a weight below 0": (chat(USER, {**ANSWER, "weight": -1}), "got -1 (int)"),
    "train in text": (chat(USER, {**ANSWER, "train": "false"}), "as train of a message, got 'false'"),
    "two thoughts": (chat(USER, {**ANSWER, "thinking": "t", "reasoning_content": "u"}), "one thought in a message"),
    "arguments that are no JSON": (chat(USER, {**ANSWER, "tool_calls": [CALL]}), "JSON as arguments of a tool call"),
    "tools that are no JSON": (chat(USER, ANSWER, tools="nope"), "column 'tools': expected JSON"),
    "a mask of the loss": ({**PAIR, "loss_mask": [1, 0]}, "nobody reads column 'loss_mask'"),
    "labels of another length": ({"input_ids": [5, 6, 7], "labels": [5, 6]}, "as many as the 3 input_ids, got '2 of"),
    "padding": ({"input_ids": [5, 6], "attention_mask": [1, 0]}, "column 'attention_mask': expected ones only"),
    "tokens in a list of lists": ({"input_ids": [[5, 6]]}, "a list of whole numbers, got [[5, 6]]"),
    "tokens of floats": ({"input_ids": [5.0, 6.0]}, "a list of whole numbers, got [5.0, 6.0]"),
    "shifted labels": ({"input_ids": [5, 6], "labels": [6, 7]}, "labels are not shifted"),
    "a token too large": ({"input_ids": [5, 10**12]}, "expected token ids from 0 on, got 1000000000000"),
    "pairs for answers": ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, "objective=dpo (or ipo"),
    "rendered text": ({"prompt": "<|im_start|>user\nHi", "completion": "x"}, "the chat template's own tokens"),
    "rows inside": ({"data": PAIR}, "no known shape of row, the columns are data"),
    "question and answer": ({"question": "a", "answer": "b"}, "as data.prompt_column=question data.completion_column="),
}


@pytest.fixture
def said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(row):
        (tmp_path / "rows.jsonl").write_text(row if isinstance(row, str) else json.dumps(row))
        status = main(["data", "model=tiny", "data=rows.jsonl", "data.cache_dir=null", "data.validation_fraction=0"])
        return status, capsys.readouterr().err

    return run


@pytest.mark.parametrize("row", READ.values(), ids=READ)
def test_everyday_row_is_read(said, row):
    status, text = said(row)
    assert status == 0 and "1 samples of 1 rows" in text


@pytest.mark.parametrize(("row", "reason"), REFUSED.values(), ids=REFUSED)
def test_everyday_row_is_refused_in_one_line(said, row, reason):
    status, text = said(row)
    (line,) = text.splitlines()
    assert status == 2 and line.startswith("error: ") and reason in line
