"""Shapes that rows of public data sets have: each is trained as it says, or refused by name."""

import json
import os
import random
import re

import pyarrow
import pyarrow.parquet
import pytest
from chat_templates import tokenizer_of
from test_rows import HELLO, HI, PLAIN, read, run, trained

from lightning_peft.data.audit import Audit
from lightning_peft.data.config import DataConfig, OnBadRow, RowKind
from lightning_peft.data.conversation import BadRow, Message, Row
from lightning_peft.data.row_reader import row_reader
from lightning_peft.data.samples import UnreadError, encode_rows, make_samples
from lightning_peft.data.sources import iterate_rows


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **keys):
    return {"role": "assistant", "content": text, **keys}


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name, *parameters):
    properties = {parameter: {"type": "string"} for parameter in parameters}
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


def encode(row, tokenizer, **options):
    return list(encode_rows([Row(row, "row 1")], DataConfig(**options), tokenizer, Audit()))


W = call("w", city="Oslo")
TURNS = {
    "author in capitals": (
        [{"from": "Human", "value": "W?"}, {"from": "Function_Call", "value": '{"name": "w", "arguments": {}}'}],
        [Message("user", "W?"), Message("assistant", "", tool_calls=(call("w"),))],
    ),
    "tool_call and tool_response": (
        [
            user("W?"),
            {"role": "tool_call", "content": '{"name": "w", "arguments": {"city": "Oslo"}}'},
            {"role": "tool_response", "content": "3 C"},
            assistant("3 C."),
        ],
        [Message("user", "W?"), Message("assistant", "", tool_calls=(W,)), Message("tool", "3 C")]
        + [Message("assistant", "3 C.")],
    ),
    "calls as JSON": (
        [user("W?"), assistant(None, tool_calls=json.dumps([W, W]))],
        [Message("user", "W?"), Message("assistant", "", tool_calls=(W, W))],
    ),
    "result without entries": (
        [user("W?"), assistant("", tool_calls=[W]), {"role": "tool", "content": []}, assistant("None.")],
        [Message("user", "W?"), Message("assistant", "", tool_calls=(W,)), Message("tool", "[]")]
        + [Message("assistant", "None.")],
    ),
    "result that is a number": (
        [user("W?"), assistant("", tool_calls=[W]), {"role": "tool", "content": 42}, assistant("42.")],
        [Message("user", "W?"), Message("assistant", "", tool_calls=(W,)), Message("tool", "42")]
        + [Message("assistant", "42.")],
    ),
    "result of objects with a type": (
        [user("W?"), assistant("", tool_calls=[W]), {"role": "tool", "content": [{"type": "city"}]}, assistant("a")],
        [Message("user", "W?"), Message("assistant", "", tool_calls=(W,)), Message("tool", '[{"type": "city"}]')]
        + [Message("assistant", "a")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TURNS)
def test_turns_are_read(name):
    turns, messages = TURNS[name]
    assert read({"messages": turns}) == messages
    assert read({"messages": json.dumps(turns)}) == messages


REFUSED_TURNS = {
    "two texts": ([{"role": "user", "content": "a", "value": "b"}, HELLO], "as content or as value of a message"),
    "two kinds of calls": (
        [HI, assistant("", tool_calls=[W], function_call={"name": "v", "arguments": {}})], "tool_calls or as function_c"
    ),
    "calls beside a call": (
        [HI, {"role": "function_call", "content": '{"name": "w"}', "tool_calls": [W]}], "the call of a function_call as"
    ),
    "two kinds of arguments": (
        [HI, assistant("", tool_calls=[{"name": "w", "arguments": {"a": 1}, "parameters": {"b": 2}}])],
        "arguments or parameters of a tool call, not both",
    ),
    "id of a call": ([HI, assistant("", tool_calls=[{**W, "id": 7}])], "text as id of a tool call, got 7"),
    "weight beyond floats": ([HI, assistant("a", weight=10**400)], "a number from 0 on as weight"),
    "nothing in a list": ([{"role": "user", "content": []}, HELLO], r"non-empty text as content .* got \[\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_TURNS)
def test_turn_that_says_two_things_is_refused(name):
    turns, message = REFUSED_TURNS[name]
    with pytest.raises(BadRow, match=message):
        read({"messages": turns})


UNREAD = {
    "part": ([user([{"type": "text", "text": "Hi", "detail": "high"}]), HELLO], "key 'detail' of a part"),
    "untrained part": ([HI, assistant([{"type": "text", "text": "a", "train": False}])], "key 'train' of a part"),
    "call": ([HI, assistant("", tool_calls=[{**W, "result": "3 C"}])], "key 'result' of a tool call"),
    "function": (
        [HI, assistant("", tool_calls=[{"function": {**W["function"], "result": 3}}])], "key 'result' of a tool call"
    ),
    "beside a function": ([HI, assistant("", tool_calls=[{**W, "arguments": {"a": 1}}])], "key 'arguments' of a tool"),
    "call as text": (
        [HI, {"role": "function_call", "content": '{"name": "w", "result": 3}'}], "key 'result' of a tool call"
    ),
}  # fmt: skip


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("name", UNREAD)
def test_what_nobody_reads_inside_a_turn_stops_the_run(name, as_text):
    turns, message = UNREAD[name]
    tokenizer = tokenizer_of("qwen3")
    rows = [{"messages": json.dumps(turns) if as_text else turns}]
    with pytest.raises(UnreadError, match=message):
        run(rows, tokenizer)
    ignored = message.split("'")[1]
    samples, audit = run(rows, tokenizer, ignore_columns=[ignored])
    assert samples and audit.samples == len(samples)


def test_unread_key_of_turns_in_json_stops_the_run(chatml):
    history = json.dumps([user("x") | {"images": ["a.png"]}, assistant("y")])
    with pytest.raises(UnreadError, match="key 'images' of a turn"):
        run([{"prompt": "Hi", "completion": "b", "history": history}], chatml)


def test_text_that_is_json_of_something_else_stays_text():
    answer = '[{"name": "Ada", "role": "CEO"}]'
    assert read({"prompt": "Who?", "completion": answer})[1] == Message("assistant", answer)


def test_prompt_of_turns_may_have_a_text_as_its_answer():
    expected = [Message("system", "Be", weight=0.0), Message("user", "Hi", weight=0.0), Message("assistant", "Hello")]
    turns = [{"role": "system", "content": "Be"}, user("Hi")]
    assert read({"prompt": turns, "completion": "Hello"}) == expected
    assert read({"prompt": "Hi", "completion": [assistant("Hello")]}) == [Message("user", "Hi"), expected[2]]
    with pytest.raises(BadRow, match="no input beside the turns of prompt, got 'x'"):
        read({"prompt": turns, "completion": "Hello", "input": "x"})


def test_column_holds_the_thought_of_an_answer():
    row = {"problem": "2+2?", "answer": "4.", "trace": "Two and two."}
    options = {"prompt_column": "problem", "completion_column": "answer", "reasoning_column": "trace"}
    thought = [Message("user", "2+2?"), Message("assistant", "4.", reasoning="Two and two.")]
    assert read(row, **options) == thought
    assert read({"instruction": "2+2?", "output": "4.", "reasoning_content": "Two and two."}) == thought
    assert read(row | {"trace": None}, **options)[1] == Message("assistant", "4.")
    assert read(row | {"answer": "<think>Two and two.</think>4."}, **options) == thought
    with pytest.raises(BadRow, match="one thought in a message"):
        read(row | {"answer": "<think>Other.</think>4."}, **options)
    with pytest.raises(BadRow, match="no thought beside the turns of answer"):
        read(row | {"answer": [assistant("4.")]}, **options)
    pair = {"prompt": "2+2?", "chosen": "4.", "rejected": "5.", "trace": "Two."}
    with pytest.raises(ValueError, match="data.reasoning_column='trace': rows of data.format=preference have none"):
        read(pair, rows=RowKind.pairs, reasoning_column="trace")


def test_switch_that_is_named_reasoning_is_no_thought(chatml):
    with pytest.raises(UnreadError, match="column 'reasoning'"):
        run([{"prompt": "Hi", "completion": "Hello", "reasoning": "off"}], chatml)


FILLED = {
    "null": ({"q": "Hi", "note": None, "a": "b"}, r"cannot be filled in \(a column is empty; {{ column or '' }}"),
    "nan": ({"q": "Hi", "note": float("nan"), "a": "b"}, r"cannot be filled in \(a column is empty"),
    "absent": ({"q": "Hi", "a": "b"}, r"cannot be filled in \('note' is undefined; {{ column \| default\(''\) }}"),
}


@pytest.mark.parametrize("name", FILLED)
def test_row_template_writes_no_column_that_is_not_there(name, chatml):
    row, message = FILLED[name]
    rows = [{"q": "Hi", "note": "x", "a": "b"}, row]
    with pytest.raises(BadRow, match=f"^row 2: data.prompt_template {message}"):
        run(rows, chatml, prompt_template="{{ q }} {{ note }}", completion_column="a")
    template = "{{ q }}{% if note is defined and note and note == note %} {{ note }}{% endif %}"
    assert len(run(rows, chatml, prompt_template=template, completion_column="a")[0]) == 2


@pytest.mark.parametrize(
    ("options", "row"),
    [
        ({"ignore_columns": ["completion"]}, {"prompt": "Hi", "completion": "b"}),
        ({"ignore_columns": ["messages"]}, PLAIN),
        ({"ignore_columns": ["q"], "prompt_template": "{{ q }}", "completion_column": "a"}, {"q": "Hi", "a": "b"}),
    ],
)
def test_column_that_is_read_cannot_be_ignored(options, row):
    with pytest.raises(ValueError, match=f"data.ignore_columns: names {options['ignore_columns'][0]}, which rows of"):
        read(row, **options)


@pytest.mark.parametrize("column", ["", "Unnamed: 0", "__index_level_0__"])
def test_row_numbers_of_pandas_are_listed(column, chatml):
    _, audit = run([{column: "7", "prompt": "Hi", "completion": "b"}], chatml)
    assert f"not read: column {column!r} (1 rows)" in audit.lines()


def test_remedy_names_columns_as_they_are_typed(chatml):
    row = {"prompt": "Hi", "completion": "b", "user's": "x", "a note": "y", "plain": "z"}
    with pytest.raises(UnreadError, match=r"""data.ignore_columns=\["user's",'a note',plain\] leaves them out"""):
        run([row], chatml)


def test_turns_after_the_last_answer_are_counted(chatml):
    _, audit = run([{"messages": [HI, HELLO, HI]}, PLAIN], chatml)
    assert "not read: turns after the last answer (1 rows)" in audit.lines()


def test_row_without_an_answer_that_counts_is_named(chatml):
    rows = [PLAIN | {"weight": 0}, PLAIN | {"weight": ""}]
    with pytest.raises(BadRow, match="^row 1: expected an answer to train, got weight 0 for all of them$"):
        run(rows, chatml)
    samples, _ = run(rows, chatml, on_bad_row=OnBadRow.skip)
    assert [sample.weights for sample in samples] == [None]


WRITTEN = {
    "end of an answer": ("chatml", [user("Hi"), assistant("Hello<|im_end|>\n")]),
    "end of Llama": ("llama3", [user("Hi"), assistant("Hello<|eot_id|>")]),
    "end of Mistral": ("mistral_v0.1", [user("Hi"), assistant("Hello</s>")]),
    "end of GLM": ("glm4moe", [user("Hi"), assistant("Hello<|user|>")]),
    "beginning of an answer": ("chatml", [user("Hi"), assistant("<|im_start|>assistant\nHello")]),
    "system": ("chatml", [{"role": "system", "content": "<|im_start|>system\nBe<|im_end|>"}, user("Hi"), HELLO]),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_turn_that_the_template_has_written_is_refused(name):
    template, turns = WRITTEN[name]
    with pytest.raises(BadRow, match="expected text without the chat template's own tokens .data.layout=raw"):
        run([{"messages": turns}], tokenizer_of(template))


def test_rejected_answer_that_the_template_has_written_is_refused(chatml):
    row = {"prompt": "Hi", "chosen": "Hello", "rejected": "No<|im_end|>"}
    with pytest.raises(BadRow, match=r"own tokens .* from the assistant, got 'No<\|im_end\|>'"):
        encode(row, chatml, rows=RowKind.pairs)


def test_token_of_the_template_inside_a_text_is_left_alone(chatml):
    turns = [user("What is <|im_end|> for?"), assistant("Well, <|im_end|> ends a turn.")]
    [sample], _ = run([{"messages": turns}], chatml)
    assert trained(sample, chatml) == "Well, <|im_end|> ends a turn.<|im_end|>"


ASKS = [user("W?"), assistant("Action: w(Oslo)"), {"role": "tool", "content": "3 degrees"}, assistant("It is 3.")]


def system(text):
    return {"role": "system", "content": text}


DROPPED = {
    "again": ("smollm3", [system("Now"), user("Hi"), HELLO, system("Now"), user("x"), HELLO], "4, which is of the s"),
    "as a part": ("smollm3", [user("Nowhere"), HELLO, system("Now"), user("x"), HELLO], "3, which is of the system"),
    "as the template says": (
        "smollm3",
        [user("Hi"), HELLO, system("Metadata"), user("x"), HELLO],
        "3, which is of the",
    ),
    "of a tool": ("phi3_5", [user("3 C?"), HELLO, {"role": "tool", "content": "3 C"}, HELLO], "3, which is of a tool"),
}


@pytest.mark.parametrize("name", DROPPED)
def test_turn_that_the_template_drops_is_refused_though_its_text_stands_elsewhere(name):
    template, turns, place = DROPPED[name]
    with pytest.raises(BadRow, match=f"does not write the content of message {place}"):
        run([{"messages": turns}], tokenizer_of(template))


def test_same_text_in_several_turns_is_written_each_time():
    tokenizer = tokenizer_of("qwen3")
    turns = [system("Now"), user("Now"), HELLO, system("Now"), user("Now"), HELLO]
    samples, _ = run([{"messages": turns}], tokenizer)
    assert tokenizer.decode(samples[-1].input_ids).count("Now") == 4


@pytest.mark.parametrize("name", ["phi3", "phi3_5"])
def test_result_that_the_template_drops_is_refused(name):
    with pytest.raises(BadRow, match="does not write the content of message 3, which is of a tool"):
        run([{"messages": ASKS}], tokenizer_of(name))


@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "granite", "lfm2", "glm4moe"])
def test_result_that_the_template_writes_is_in_the_prompt(name):
    tokenizer = tokenizer_of(name)
    samples, _ = run([{"messages": ASKS}], tokenizer)
    assert "3 degrees" in tokenizer.decode(samples[-1].input_ids)


def test_second_call_that_the_template_drops_is_refused():
    turns = [user("W?"), assistant("", tool_calls=[W, call("w", city="Rome")])]
    with pytest.raises(BadRow, match="writes one call of a turn, and a turn has 2 of them"):
        run([{"messages": turns}], tokenizer_of("gptoss"))
    tokenizer = tokenizer_of("qwen3")
    [sample], _ = run([{"messages": turns}], tokenizer)
    assert "Oslo" in trained(sample, tokenizer) and "Rome" in trained(sample, tokenizer)


UNION = [
    {"messages": [user("W?"), assistant(None, tool_calls=[W])], "tools": [tool("w", "city")]},
    {"messages": [user("T?"), assistant(None, tool_calls=[call("t", zone="CET")])], "tools": [tool("t", "zone")]},
]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_nulls_that_arrow_fills_objects_with_are_left_out(kind, tmp_path):
    """A column of Arrow has the keys of all its objects in each of them; its JSON export has them too."""
    table = pyarrow.Table.from_pylist(UNION)
    assert table.to_pylist()[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]["zone"] is None
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    config = DataConfig(train_path=str(path), validation_fraction=0)
    read_rows = [row for row in iterate_rows(config, "train") if not isinstance(row, BadRow)]
    for row, written in zip(read_rows, UNION, strict=True):
        found, expected = (row_reader(one.values, config)(one) for one in (row, Row(written, "")))
        assert (found, found.tools) == (expected, expected.tools)


def test_null_that_json_says_is_kept():
    turns = [user("W?"), assistant(None, tool_calls=[call("w", city=None)])]
    [_, said] = read({"messages": turns, "tools": [tool("w", "city")]})
    assert said.tool_calls[0]["function"]["arguments"] == {"city": None}


@pytest.mark.parametrize("given", ["rows.jsonl", "*.jsonl", ""])
def test_link_that_leads_nowhere_is_named(given, tmp_path):
    os.symlink(tmp_path / "absent", tmp_path / "rows.jsonl")
    (tmp_path / "good.jsonl").write_text(json.dumps(PLAIN) + "\n")
    with pytest.raises(ValueError, match="rows.jsonl is a link to a file that is not there"):
        list(iterate_rows(DataConfig(train_path=str(tmp_path / given), validation_fraction=0), "train"))


def test_parquet_column_that_stands_twice_is_named(tmp_path, chatml):
    columns = [pyarrow.array([text]) for text in ("a", "b", "c")]
    names = ["prompt", "completion", "completion"]
    pyarrow.parquet.write_table(pyarrow.table(columns, names=names), tmp_path / "rows.parquet")
    config = DataConfig(train_path=str(tmp_path / "rows.parquet"), validation_fraction=0, cache_dir=None)
    with pytest.raises(ValueError, match="rows.parquet: the column 'completion' is there more than once"):
        make_samples(config, "train", chatml)


def test_pair_of_turns_in_a_table_of_text_is_read():
    chosen, rejected = ([user("Hi"), assistant(text)] for text in ("good", "bad"))
    row = {"chosen": json.dumps(chosen), "rejected": json.dumps(rejected)}
    conversation = read(row, rows=RowKind.pairs)
    assert [conversation[-1].content, conversation.rejected[-1].content] == ["good", "bad"]


VALUES = [
    None, "", [], {}, 0, -1, 1.5, float("nan"), float("inf"), True, "x", ["x"], [["x"]], {"a": 1}, {"role": "user"},
    "\0", "\ud800", "[", '{"a":', 10**400, [None], {"type": "text"}, [{"type": "text"}], b"x", "[[[[", "null",
    {"name": "w"},
    [{"name": "w"}], {"function": None}, {"function": {"name": "w", "arguments": "[1]"}}, {1: 2}, {"": ""},
]  # fmt: skip
WHOLE = {
    "chat": ({
        "messages": [
            {"role": "system", "content": "s"}, user("Hi"), assistant("a", reasoning_content="t", weight=1), user("x"),
            assistant("", tool_calls=[{**W, "id": "c"}]), {"role": "tool", "content": "3", "tool_call_id": "c"},
            assistant("z"),
        ],
        "tools": [tool("w", "city")], "weight": 1,
    }, {}),
    "sharegpt": ({
        "conversations": [
            {"from": "human", "value": "x"}, {"from": "function_call", "value": '{"name": "w", "arguments": {}}'},
            {"from": "observation", "value": "3"}, {"from": "gpt", "value": "z"},
        ],
        "system": "s",
    }, {}),
    "instruction": ({"instruction": "a", "output": "b", "system": "s", "history": [["a", "b"]], "input": "i"}, {}),
    "tokens": ({"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "weights": [1, 1, 1]}, {}),
    "pair": ({"prompt": [user("Hi")], "chosen": [assistant("a")], "rejected": [assistant("b")]}, {
        "rows": RowKind.pairs
    }),
    "labelled": ({"prompt": "Hi", "completion": "a", "label": True}, {"rows": RowKind.labelled}),
    "template": ({"a": "x", "b": ["y"], "completion": "c"}, {"prompt_template": "{{ a }}{{ b[0] }}{{ b | length }}"}),
}  # fmt: skip


def places(value, place=()):
    yield from [place] if place else []
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*place, key))


@pytest.mark.parametrize("name", WHOLE)
def test_no_value_anywhere_in_a_row_is_a_traceback(name):
    """Each value of a row is taken for another in turn: it is read, or refused in one line that can be printed."""
    row, options = WHOLE[name]
    tokenizer, refused, seen = tokenizer_of("qwen3"), 0, 0
    for place in places(row):
        for value in VALUES:
            changed = json.loads(json.dumps(row))
            inner = changed
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
            seen += 1
            try:
                encode(changed, tokenizer, **options)
            except (BadRow, UnreadError) as error:
                refused += 1
                assert "\n" not in str(error) and str(error).encode()
    assert 0 < refused < seen


PIECES = [
    "Hi",
    "é",
    "😀",
    " two  spaces ",
    "1.5\n\nnew",
    "<b>x</b>",
    "{{ x }}",
    "</s>",
    "\tTab",
    "[INST]",
    "\r\n",
    "'\"",
]


def words_in(text):
    return set(re.findall(r"u\d+q", text))


def words_of(message):
    return words_in(message.content)


def messages_of(rng):
    """Return turns as agents' traces have them: parallel calls, results without calls, system turns in the middle."""
    words = iter(range(1000))

    def text():
        return f"u{next(words)}q " + " ".join(rng.choices(PIECES, k=rng.randrange(3))) + " end."

    messages = [Message("system", text())] if rng.random() < 0.3 else []
    for _ in range(rng.randrange(1, 4)):
        messages.append(Message("user", text()))
        if rng.random() < 0.1:
            messages.append(Message(rng.choice(["user", "system"]), text()))
        if (kind := rng.random()) < 0.3:
            calls = tuple(call("w", city=text(), more=rng.choice([1, None, [True]])) for _ in range(rng.choice([1, 2])))
            messages.append(Message("assistant", rng.choice(["", text()]), tool_calls=calls))
            messages += [Message("tool", text(), name="w") for _ in calls]
        elif kind < 0.5:
            messages += [Message("assistant", text()), Message("tool", text())]
        messages.append(Message("assistant", text(), weight=float(rng.random() < 0.8)))
    return messages


@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "gptoss", "phi3", "glm4moe", "gemma4_v5", "nemotron_3_nano"])
def test_all_that_was_said_before_is_in_the_prompt(name):
    """Every word of the turns before an answer, and of the answer itself, is in the sample, or the row is refused."""
    tokenizer, rng = tokenizer_of(name), random.Random(name)
    fitting = 0
    for _ in range(60):
        messages = messages_of(rng)
        turns = [
            {"role": m.role, "content": m.content, "tool_calls": list(m.tool_calls), "weight": m.weight}
            if m.role == "assistant" else {"role": m.role, "content": m.content}
            for m in messages
        ]  # fmt: skip
        try:
            samples, _ = run([{"messages": turns}], tokenizer, max_length=10_000)
        except BadRow:
            continue
        fitting += 1
        stop = max(i for i, message in enumerate(messages) if message.role == "assistant" and message.weight)
        whole = tokenizer.decode(samples[-1].input_ids)
        said = "".join(trained(sample, tokenizer) for sample in samples)
        answers = [message for message in messages[: stop + 1] if message.role == "assistant" and message.weight]
        assert all(words_of(message) <= words_in(said) for message in answers)
        others = [message for message in messages[:stop] if message.role != "assistant"]
        assert all(words_of(message) <= words_in(whole) for message in others)
        cities = [one["function"]["arguments"]["city"].split()[0] for answer in answers for one in answer.tool_calls]
        assert all(city in said for city in cities)
    assert fitting > 10
