"""Rows as people bring them: nothing of them is dropped in silence, and what is wrong with one is said of that one."""

import json

import datasets
import pytest
from chat_templates import tokenizer_of

from lightning_peft.data.audit import Audit
from lightning_peft.data.batch import IGNORED_LABEL
from lightning_peft.data.config import DataConfig, Layout, OnBadRow, Reasoning, Trained
from lightning_peft.data.conversation import BadRow, Message, Row
from lightning_peft.data.datamodule import SFTDataModule
from lightning_peft.data.rendering import _log_open_thought
from lightning_peft.data.row_reader import row_reader
from lightning_peft.data.samples import UnreadError, encode_rows, make_samples

HI, HELLO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there."}
PLAIN = {"messages": [HI, HELLO]}
CALL = {"type": "function", "function": {"name": "w", "arguments": {}}}


def run(rows, tokenizer, **options):
    audit = Audit()
    numbered = [Row(values, f"row {number}") for number, values in enumerate(rows, start=1)]
    return list(encode_rows(numbered, DataConfig(**options), tokenizer, audit)), audit


def trained(sample, tokenizer):
    return tokenizer.decode([label for label in sample.labels if label != -100])


def read(values, **options):
    return row_reader(values, DataConfig(**options))(Row(values, "a.jsonl line 1"))


UNREAD = {
    "images": (
        {**PLAIN, "images": ["cat.png"]},
        r"column 'images' \(2 rows\) of 2 rows: data.ignore_col",
    ),
    "key": ({"messages": [HI, {**HELLO, "audio": {"id": 1}}]}, r"key 'audio' of a turn \(2 rows\)"),
    "context": ({"prompt": "Hi", "completion": "Hello", "context": "x"}, r"column 'context' \(2 rows\)"),
    "label": ({"text": "Hi", "label": 1}, r"column 'label' \(2 rows\)"),
    "mask": ({"messages": [HI, {**HELLO, "mask": 1}]}, r"key 'mask' of a turn"),
    "trained": ({"messages": [HI, {**HELLO, "isTrained": False}]}, r"key 'isTrained' of a turn"),
    "ids": ({"input_ids": [5, 6, 7], "label_ids": [-100, 6, 7]}, r"column 'label_ids'"),
    "tokens": ({**PLAIN, "input_ids": [5, 6, 7]}, r"column 'input_ids'"),
    "article": ({"prompt": "Sum up", "completion": "x", "source": "A long article. " * 9}, r"column 'source'"),
    "poem": ({"prompt": "Sum up", "completion": "x", "topic": "One line\nand another"}, r"column 'topic'"),
}
UNREAD |= {
    name: ({"prompt": "Hi", "completion": "Hello", name: value}, f"column '{name}'")
    for name, value in {
        "schema": "CREATE TABLE t (a int)", "dataset_schema": "t(a)", "title": "T", "subject": "S",
        "language": "French", "knowledge_source": "Passage",
        "prompt_metadata": "You are a pirate", "loss_weight": 0.0, "sample_weight": 0,
        "is_trained": False, "enable_thinking": False, "a": 3, "b": 4.5, "loss_score": 1.0, "train_id": 1,
    }.items()
}  # fmt: skip


@pytest.mark.parametrize("name", UNREAD)
def test_what_nobody_reads_stops_the_run(name, chatml):
    row, message = UNREAD[name]
    with pytest.raises(UnreadError, match=message):
        run([row, row], chatml)


def test_unread_column_is_counted_over_all_rows_and_ignored_on_request(chatml):
    rows = [PLAIN] * 300 + [{**PLAIN, "images": ["cat.png"]}] * 300
    with pytest.raises(UnreadError, match=r"column 'images' \(300 rows\) of 600 rows"):
        run(rows, chatml)
    samples, _ = run(rows, chatml, ignore_columns=["images"])
    assert len(samples) == 600


def test_ids_and_scores_are_listed_once_and_empty_columns_are_not(chatml):
    rows = [{**PLAIN, "id": "a", "quality_score": 3, "upvotes": 4, "images": None, "notes": ""}] * 3
    _, audit = run(rows, chatml)
    assert audit.lines()[-1] == (
        "not read: column 'id' (3 rows), column 'quality_score' (3 rows), column 'upvotes' (3 rows)"
    )


BESIDE_THE_POINT = {
    "prompt_id": "f3a", "conversation_hash": "9" * 64, "image_url": "https://a.b/" + "c" * 200, "num_turns": 2,
    "source": "airoboros2.2", "category": "orca", "type": "MATH_AnsAug", "_template_idx": 3, "_task_source": "P3",
    "_template_type": "zs_opt", "score_chosen": 7.5, "chosen-rating": 4, "helpfulness": 3, "toxicity": {"toxic": 0.1},
    "metadata": {"note": "long " * 50}, "lang": "en", "model": "gpt-4", "created_at": 1.7e9, "parentId": "a",
    "rank": 0.0,    "tags": ["a", "b"], "Unnamed: 0": 4,
}  # fmt: skip


@pytest.mark.parametrize("name", BESIDE_THE_POINT)
def test_what_data_sets_say_of_their_rows_is_listed(name, chatml):
    _, audit = run([{"prompt": "Hi", "completion": "Hello", name: BESIDE_THE_POINT[name]}], chatml)
    assert audit.lines()[-1] == f"not read: column {name!r} (1 rows)"


def test_column_that_the_task_scores_by_is_listed(chatml):
    row = {"prompt": "How many?", "completion": "SELECT 1", "schema": "CREATE TABLE t (a int)"}
    _, audit = run([row], chatml, task="text_to_sql")
    assert audit.lines()[-1] == "not read: column 'schema' (1 rows)"


def test_columns_beside_prompt_and_answer_are_read():
    values = {
        "instruction": "And of Norway?",
        "input": "One word.",
        "output": "Oslo.",
        "system": "You are a geographer.",
        "history": [["Capital of France?", "Paris."]],
    }
    assert read(values) == [
        Message("system", "You are a geographer."),
        Message("user", "Capital of France?"),
        Message("assistant", "Paris.", weight=0.0),
        Message("user", "And of Norway?\n\nOne word."),
        Message("assistant", "Oslo."),
    ]
    prompt = {"prompt": "Translate", "input": "chat", "completion": "cat", "sys": "Be terse."}
    assert read(prompt, system_column="sys") == [
        Message("system", "Be terse."),
        Message("user", "Translate\n\nchat"),
        Message("assistant", "cat"),
    ]


@pytest.mark.parametrize("tools", [[{"name": "w"}], json.dumps([{"name": "w"}]), [json.dumps({"name": "w"})]])
def test_tools_column_is_a_list_or_json(tools):
    assert read({**PLAIN, "tools": tools}).tools == [{"name": "w"}]


TURNS = {
    "sharegpt calls": (
        [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": '{"name": "w", "arguments": {}}'},
            {"from": "observation", "value": "3 C"},
            {"from": "gpt", "value": "3 C."},
        ],
        [
            Message("user", "Weather?"),
            Message("assistant", "", tool_calls=(CALL,)),
            Message("tool", "3 C"),
            Message("assistant", "3 C."),
        ],
    ),
    "author twice": (
        [{"role": "user", "from": "human", "value": "Hi"}, {"role": "assistant", "from": "gpt", "value": "Hello"}],
        [Message("user", "Hi"), Message("assistant", "Hello")],
    ),
    "arguments as text": (
        [HI, {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "w", "arguments": "{}"}}]}],
        [Message("user", "Hi"), Message("assistant", "", tool_calls=(CALL,))],
    ),
    "content in parts": (
        [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, HELLO],
        [Message("user", "Hi"), Message("assistant", "Hello there.")],
    ),
    "thought": (
        [HI, {**HELLO, "reasoning_content": "Greet."}],
        [Message("user", "Hi"), Message("assistant", "Hello there.", reasoning="Greet.")],
    ),
    "weights": (
        [HI, {**HELLO, "weight": 0.5}, HI, {**HELLO, "train": False}, HI, {**HELLO, "loss": 0}],
        [Message("user", "Hi"), Message("assistant", "Hello there.", weight=0.5)]
        + [Message("user", "Hi"), Message("assistant", "Hello there.", weight=0.0)] * 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TURNS)
def test_turns_of_every_spelling_are_read(name):
    turns, messages = TURNS[name]
    assert read({"messages": turns}) == messages


def test_turn_of_weight_zero_is_context_and_a_float_scales_its_loss(chatml):
    rows = [{"messages": [HI, {**HELLO, "weight": 0}, HI, {"role": "assistant", "content": "one", "weight": 0.25}]}]
    [sample], _ = run(rows, chatml)
    assert trained(sample, chatml) == "one<|im_end|>"
    assert {w for w, label in zip(sample.weights, sample.labels, strict=True) if label != -100} == {0.25}
    samples, _ = make_batchable(rows + [PLAIN], chatml)
    assert samples[1].weights == [1.0] * len(samples[1].input_ids) and samples[0].weights == sample.weights


def make_batchable(rows, tokenizer):
    from lightning_peft.data.token_store import Samples

    encoded, audit = run(rows, tokenizer)
    return Samples.of(encoded), audit


def test_only_the_last_turn_is_trained_on_request(chatml):
    [sample], _ = run(
        [{"messages": [HI, HELLO, HI, {"role": "assistant", "content": "one"}]}], chatml, train_on_last_turn=True
    )
    assert trained(sample, chatml) == "one<|im_end|>"


THINKS = {"messages": [HI, {**HELLO, "reasoning_content": "Greet."}, HI, {**HELLO, "reasoning_content": "Again."}]}


def test_reasoning_option_says_which_thoughts_are_trained():
    tokenizer = tokenizer_of("qwen3")
    texts = {
        rule: "".join(trained(sample, tokenizer) for sample in run([THINKS], tokenizer, reasoning=rule)[0])
        for rule in Reasoning
    }
    assert ("Greet." in texts[Reasoning.keep], "Again." in texts[Reasoning.keep]) == (True, True)
    assert ("Greet." in texts[Reasoning.last], "Again." in texts[Reasoning.last]) == (False, True)
    assert "Greet." not in texts[Reasoning.drop] and "Again." not in texts[Reasoning.drop]


def test_parts_that_are_not_trained_have_no_label():
    tokenizer = tokenizer_of("qwen3")
    samples, audit = run([THINKS], tokenizer, train_on=[Trained.answer])
    assert [trained(sample, tokenizer) for sample in samples] == ["Hello there.<|im_end|>"] * 2
    assert set(audit.kinds) == {"answer", "end"}


def test_part_that_no_row_has_leaves_only_ends_to_train_and_is_said():
    samples, audit = run([{"messages": [HI, HELLO]}], tokenizer_of("chatml"), train_on=[Trained.reasoning])
    assert [trained(sample, tokenizer_of("chatml")) for sample in samples] == ["<|im_end|>"]
    assert "only end tokens are trained: no row has another part that data.train_on names" in audit.warnings()


def test_audit_counts_the_labels_by_kind():
    tokenizer = tokenizer_of("qwen3")
    samples, audit = run([THINKS], tokenizer)
    assert sum(audit.kinds.values()) == audit.supervised == sum(map(bool, b"".join(s.kinds for s in samples)))
    assert audit.own_turns == 1
    assert any(line.startswith("trained tokens: ") and "reasoning" in line for line in audit.lines())
    assert any("1 turns are samples of their own" in line for line in audit.lines())


ALTERNATES = {"messages": [HI, HI, HELLO]}
BAD = {
    "half a surrogate pair": ({"prompt": "cut \ud83d", "completion": "ok"}, "chatml", "row 2: expected UTF-8 text"),
    "refused by the template": (ALTERNATES, "mistral_v0.1", "row 2: the chat template refuses .* must alternate"),
    "system refused": (
        {"messages": [{"role": "system", "content": "x"}, HI, HELLO]}, "gemma", "row 2: .*not supported"
    ),
    "role is a list": ({"messages": [{"role": ["user"], "content": "x"}, HELLO]}, "chatml", "row 2.*a role among"),
    "thought nobody writes": (
        {"messages": [HI, {**HELLO, "reasoning_content": "x y z"}]}, "gemma4", "row 2: .*data.reasoning=drop"
    ),
    "tools nobody writes": ({**PLAIN, "tools": [{"name": "w"}]}, "chatml", "row 2: .*ignore_columns=.tools"),
    "already rendered": (
        {"messages": [{"role": "user", "content": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"}, HELLO]},
        "chatml", "row 2: expected text without the chat template's own tokens .data.layout=raw",
    ),
    "weight": ({"messages": [HI, {**HELLO, "weight": "much"}]}, "chatml", "row 2.*a number from 0 on as weight"),
    "call": ({"messages": [HI, {**HELLO, "tool_calls": ["w"]}]}, "chatml", "row 2.*tool calls with a function"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_fault_of_one_row_is_named_and_skipped_on_request(name):
    row, template, message = BAD[name]
    tokenizer = tokenizer_of(template)
    if "prompt" in row:
        rows = [{"prompt": "Hi", "completion": "Hello"}, row, {"prompt": "Hi", "completion": "Hello"}]
    else:
        rows = [PLAIN, row, PLAIN]
    with pytest.raises(BadRow, match=message):
        run(rows, tokenizer)
    samples, audit = run(rows, tokenizer, on_bad_row=OnBadRow.skip)
    assert len(samples) == 2 and audit.bad_rows == 1


@pytest.mark.parametrize("first", [{"_meta": "exported"}, {"prompt": "only"}, {"text": "stray"}])
def test_first_row_does_not_decide_what_the_others_are(first, chatml):
    samples, audit = run([first, *[{"prompt": "Hi", "completion": "Hello"}] * 5], chatml, on_bad_row=OnBadRow.skip)
    assert (len(samples), audit.bad_rows) == (5, 1)


def test_first_row_that_is_no_row_is_named(chatml):
    with pytest.raises(BadRow, match="^row 1: expected a column 'prompt', got '_meta'"):
        run([{"_meta": "exported"}, {"prompt": "Hi", "completion": "Hello"}], chatml)


def test_prompt_template_writes_columns_into_the_prompt():
    values = {"title": "Oslo", "body": "rainy", "answer": "Yes."}
    options = {"prompt_template": "{{ title }}: {{ body }}?", "completion_column": "answer"}
    conversation = read(values, **options)
    assert conversation == [Message("user", "Oslo: rainy?"), Message("assistant", "Yes.")]
    assert conversation.unread == ()
    with pytest.raises(ValueError, match="data.prompt_template: the rows have no column body"):
        read({"title": "Oslo", "answer": "Yes."}, **options)


def test_raw_layout_trains_the_completion_as_it_stands(chatml):
    row = {"prompt": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "completion": "Hello<|im_end|>"}
    [sample], _ = run([row], chatml, layout=Layout.raw)
    assert chatml.decode(sample.input_ids) == row["prompt"] + row["completion"]
    assert trained(sample, chatml) == "Hello<|im_end|>"
    [plain], _ = run([{"prompt": "Hi ", "completion": "there"}], chatml, layout=Layout.raw)
    assert (chatml.decode(plain.input_ids), trained(plain, chatml)) == ("Hi there<|im_end|>", "there<|im_end|>")


def test_only_what_follows_the_end_is_cut_so_nothing_is_lost(chatml):
    [whole], _ = run([PLAIN], chatml)
    [sample], audit = run([PLAIN], chatml, max_length=len(whole.input_ids) - 1)
    assert (audit.truncated, audit.ended, audit.warnings()) == (0, 1, []) and sample.ends


def test_end_of_the_first_answer_counts_where_the_second_is_cut(chatml):
    [whole], _ = run([{"messages": [HI, HELLO, HI, {"role": "assistant", "content": "one two three"}]}], chatml)
    rows = [{"messages": [HI, HELLO, HI, {"role": "assistant", "content": "one two three"}]}]
    _, audit = run(rows, chatml, max_length=len(whole.input_ids) - 3)
    assert (audit.truncated, audit.ended) == (1, 1)
    assert audit.warnings() == ["1 answers are cut at data.max_length: 2 of their tokens and their end are not trained"]


def test_trailing_turns_that_are_no_answer_are_left_out(chatml):
    assert run([{"messages": [HI, HELLO, HI]}], chatml)[0] == run([PLAIN], chatml)[0]


def test_new_end_token_that_is_not_special_ends_an_answer(make_tokenizer):
    tokenizer = make_tokenizer(tokenizer_of("chatml").chat_template.replace("<|im_end|>", "<|done|>"))
    tokenizer.add_tokens(["<|done|>"])
    [sample], audit = run([PLAIN], tokenizer)
    assert trained(sample, tokenizer) == "Hello there.<|done|>" and audit.ended == 1


def config_of(path, **options):
    return DataConfig(train_path=str(path), validation_fraction=0, cache_dir=None, **options)


def test_json_array_of_another_encoding_is_a_bad_row(tmp_path, chatml):
    path = tmp_path / "rows.json"
    path.write_bytes(json.dumps([PLAIN, PLAIN]).replace("Hi", "\u00e9", 1).encode("latin-1"))
    with pytest.raises(BadRow, match="rows.json row 1: expected UTF-8 text"):
        make_samples(config_of(path), "train", chatml)
    assert len(make_samples(config_of(path, on_bad_row=OnBadRow.skip), "train", chatml)[0]) == 1


def test_row_nested_too_deeply_is_a_bad_row(write_jsonl, chatml):
    path = write_jsonl([PLAIN, '{"messages": ' + "[" * 100_000 + "}", PLAIN])
    assert len(make_samples(config_of(path, on_bad_row=OnBadRow.skip), "train", chatml)[0]) == 2


def test_repeated_csv_header_is_an_error(tmp_path, chatml):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion,completion\na,b,c\n")
    with pytest.raises(ValueError, match="rows.csv line 1: the column 'completion' is there more than once"):
        make_samples(config_of(path), "train", chatml)


def test_two_stars_read_every_folder(tmp_path, chatml):
    for place in ("top", "a/mid", "a/b/low"):
        path = tmp_path / f"{place}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(PLAIN) + "\n")
    assert len(make_samples(config_of(tmp_path / "**" / "*.jsonl"), "train", chatml)[0]) == 3


def test_parquet_file_without_rows_says_so(tmp_path, chatml):
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict({"prompt": [], "completion": []}).to_parquet(path)
    with pytest.raises(ValueError, match="rows.parquet: holds no rows"):
        make_samples(config_of(path), "train", chatml)


def test_copies_within_and_across_splits_are_counted(write_jsonl, chatml):
    rows = [{"prompt": "Hi", "completion": word} for word in ("one", "two", "two", "three")]
    config = DataConfig(
        train_path=write_jsonl(rows), validation_path=write_jsonl(rows[1:2], "v.jsonl"), cache_dir=None, max_length=64
    )
    module = SFTDataModule(config, chatml, 0)
    module.setup()
    assert (module.train_audit.repeated, module.validation_audit.seen_in_training) == (1, 1)
    assert "1 of 4 samples are copies of an earlier one" in module.train_audit.warnings()


def test_token_beyond_the_embedding_is_an_error(write_jsonl, chatml):
    config = config_of(write_jsonl([PLAIN]), max_length=64)
    with pytest.raises(
        ValueError, match=r"rows.jsonl line 1: .* has the id \d+, the model has embeddings for 100: take the"
    ):
        SFTDataModule(config, chatml, 0, vocabulary=100).setup()


NAMED = "{% for m in messages %}{{ '<|im_start|>' + m.role + (' ' + m.name if m.name else '') + '\n' + m.content }}"
NAMED += "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def named_turns(role):
    turns = [{"role": "system", "content": "Be"}, {"role": "user", "content": "Hi"}]
    turns += [{"role": "assistant", "content": "Hello"}]
    return {"messages": [turn | ({"name": "Ada"} if turn["role"] == role else {}) for turn in turns]}


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_name_of_a_turn_is_written_or_said_to_be_unread(role, chatml, make_tokenizer, write_jsonl):
    path = write_jsonl([named_turns(role)])
    with pytest.raises(UnreadError, match=rf"nobody reads key 'name' of a turn of the {role} \(1 rows\)"):
        make_samples(DataConfig(train_path=path, validation_fraction=0.0), "train", chatml)
    without = DataConfig(train_path=path, validation_fraction=0.0, ignore_columns=["name"])
    samples, _ = make_samples(without, "train", chatml)
    assert "Ada" not in chatml.decode(samples[0].input_ids)
    tokenizer = make_tokenizer(NAMED, bos="<|im_start|>", eos="<|im_end|>")
    if role == "assistant":  # a prompt to generate from does not have it
        with pytest.raises(BadRow, match="line 1: the chat template is not prefix-stable"):
            make_samples(DataConfig(train_path=path, validation_fraction=0.0), "train", tokenizer)
        return
    samples, _ = make_samples(DataConfig(train_path=path, validation_fraction=0.0), "train", tokenizer)
    assert f"{role} Ada\n" in tokenizer.decode(samples[0].input_ids)


@pytest.mark.parametrize("key", ["weight", "reasoning_content", "name"])
def test_any_key_of_a_turn_can_be_ignored(key, chatml, write_jsonl):
    value = {"weight": 0, "reasoning_content": "Hmm", "name": "Ada"}[key]
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", key: value}]
    path = write_jsonl([{"messages": turns}])
    config = DataConfig(train_path=path, validation_fraction=0.0, ignore_columns=[key])
    samples, audit = make_samples(config, "train", chatml)
    assert chatml.decode([label for label in samples[0].labels if label != -100]) == "Hello<|im_end|>"


BESIDE = {
    "a thought": {"reasoning_content": "Hmm"},
    "tool calls": {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
    "a name": {"name": "Ada"},
}


@pytest.mark.parametrize("what", BESIDE)
def test_raw_rows_with_more_than_text_are_refused(what, chatml, write_jsonl):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"} | BESIDE[what]]
    config = DataConfig(train_path=write_jsonl([{"messages": turns}]), validation_fraction=0.0, layout=Layout.raw)
    with pytest.raises(BadRow, match=f"line 1: data.layout=raw: .* this row has {what} beside"):
        make_samples(config, "train", chatml)


def test_thought_of_a_user_is_refused(chatml):
    with pytest.raises(BadRow, match="row 1, .*: expected a thought on turns of the assistant only, got 'user'"):
        run([{"messages": [HI | {"reasoning_content": "Hmm"}, HELLO]}], chatml)


def test_thought_that_stands_twice_is_written_once():
    tokenizer = tokenizer_of("qwen3")
    answer = {"role": "assistant", "content": "<think>\nHmm\n</think>\n\nHello", "reasoning_content": "Hmm"}
    [sample], _ = run([{"messages": [HI, answer]}], tokenizer)
    assert trained(sample, tokenizer) == "<think>\nHmm\n</think>\n\nHello<|im_end|>"
    with pytest.raises(BadRow, match="one thought in a message, and its content begins with another"):
        run([{"messages": [HI, answer | {"reasoning_content": "Other"}]}], tokenizer)


def test_what_is_left_out_on_request_is_counted(chatml):
    rows = [{"messages": [HI | {"mood": "good"}, HELLO], "rating": "A"}, PLAIN]
    _, audit = run(rows, chatml, ignore_columns=["rating", "mood", "nothing"])
    assert "left out by data.ignore_columns: mood (1 rows), nothing (0 rows), rating (1 rows)" in audit.lines()


def test_weight_of_a_user_is_listed(chatml):
    _, audit = run([{"messages": [HI | {"weight": 1}, HELLO]}], chatml)
    assert "not read: key 'weight' of a turn of the user (1 rows)" in audit.lines()


def test_shared_tools_are_written_in_prompts_as_in_training(write_jsonl):
    tokenizer = tokenizer_of("qwen3")
    tool = {"type": "function", "function": {"name": "w", "description": "W", "parameters": {"type": "object"}}}
    path = write_jsonl([PLAIN | {"tools": [tool]}] * 3)
    module = SFTDataModule(DataConfig(train_path=path, validation_fraction=0.0, cache_dir=None), tokenizer, 0)
    module.setup()
    layout = module.prompt_layout
    prompt = layout.prompt(layout.conversation("Hi"), tokenizer)
    assert module.training_samples[0].input_ids[: len(prompt)] == prompt


BRIEFLY = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("options", [{}, {"streaming": True}])
def test_shared_system_message_is_written_in_prompts_as_in_training(write_jsonl, chatml, options):
    path = write_jsonl([{"messages": [BRIEFLY, HI, HELLO]}] * 3)
    module = SFTDataModule(DataConfig(train_path=path, validation_fraction=0.0, cache_dir=None, **options), chatml, 0)
    module.setup()
    layout = module.prompt_layout
    assert layout.system_prompt == "Be brief."
    prompt = layout.prompt(layout.conversation(HI["content"]), chatml)
    assert module.training_samples[0].input_ids[: len(prompt)] == prompt


@pytest.mark.parametrize(
    ("first", "option", "expected"),
    [
        ([], None, None),
        ([BRIEFLY | {"content": "Else."}], None, None),
        ([], "Be kind.", "Be kind."),
        ([BRIEFLY], "x", "x"),
    ],
)
def test_system_message_that_not_all_rows_have_is_not_put_before_prompts(write_jsonl, chatml, first, option, expected):
    path = write_jsonl([{"messages": [BRIEFLY, HI, HELLO]}, {"messages": [*first, HI, HELLO]}])
    config = DataConfig(train_path=path, validation_fraction=0.0, cache_dir=None, system_prompt=option)
    module = SFTDataModule(config, chatml, 0)
    module.setup()
    assert module.prompt_layout.system_prompt == expected


@pytest.mark.parametrize(
    ("answer", "trained"),
    [
        ("Sure. <think>Hm.</think> It is 4.", "Sure. It is 4."),
        ("<think>a</think>One. <think>b</think> Two.", "One. Two."),
        ("Write `<think>x</think>` for it.", "Write `<think>x</think>` for it."),
        ("```\n<think>x</think>\n```\nSo. <think>y</think>", "```\n<think>x</think>\n```\nSo."),
        ("It opens <think> alone.", "It opens <think> alone."),
    ],
)
def test_dropped_thoughts_are_those_inside_answers_too(chatml, answer, trained):
    samples, _ = run([{"messages": [HI, HELLO | {"content": answer}]}], chatml, reasoning=Reasoning.drop)
    labels = [label for label in samples[0].labels if label != IGNORED_LABEL]
    assert chatml.decode(labels).replace("<|im_end|>", "").strip() == trained
    kept, _ = run([{"messages": [HI, HELLO | {"content": answer}]}], chatml)
    assert "<think>" not in answer or "<think>" in chatml.decode(kept[0].input_ids)


def test_thought_that_is_not_closed_stays_and_is_said(chatml, caplog):
    _log_open_thought.cache_clear()
    samples, _ = run([{"messages": [HI, HELLO | {"content": "<think>It is"}]}], chatml, reasoning=Reasoning.drop)
    assert "<think>It is" in chatml.decode(samples[0].input_ids)
    assert "data.reasoning=drop: an answer that opens a thought and does not close it stays" in caplog.text


TURNS_AS_TEXT = json.dumps([HI, HELLO])


@pytest.mark.parametrize(
    ("row", "options", "last"),
    [
        ({"prompt": "Give turns", "completion": TURNS_AS_TEXT}, {}, TURNS_AS_TEXT),
        ({"instruction": "Give turns", "output": TURNS_AS_TEXT}, {}, TURNS_AS_TEXT),
        ({"prompt": "Give turns: ", "completion": TURNS_AS_TEXT}, {"layout": Layout.raw}, TURNS_AS_TEXT),
        ({"text": TURNS_AS_TEXT}, {}, TURNS_AS_TEXT),
        ({"messages": TURNS_AS_TEXT}, {}, "Hello there."),
        ({"prompt": json.dumps([HI]), "completion": json.dumps([HELLO])}, {}, "Hello there."),
    ],
    ids=["answer", "output", "raw", "text", "messages", "prompt"],
)
def test_turns_in_json_are_turns_only_where_turns_may_stand(row, options, last):
    assert read(row, **options)[-1].content == last


SYSTEM = {"role": "system", "content": "Be brief"}
NO_WEIGHT_OR_QUESTION = {
    "factors of a turn": ({"messages": [HI, {**HELLO, "weight": 1e30, "loss": 1e30}]}, "a product of at most 3.4e"),
    "row and turn": ({"messages": [HI, {**HELLO, "weight": 1e30}], "weight": 1e30}, "whose product is at most 3.4e"),
    "system turn alone": ({"prompt": [SYSTEM], "completion": "Hello"}, "'prompt': expected a user message before the"),
    "user behind the answer": (
        {"prompt": [SYSTEM], "completion": [HELLO, HI, HELLO]},
        "'prompt': expected a user message before the",
    ),
    "no turn of a user": ({"prompt": [SYSTEM], "completion": [HELLO]}, "'prompt': expected a user message before the"),
}


@pytest.mark.parametrize("name", NO_WEIGHT_OR_QUESTION)
def test_weights_beyond_fp32_and_answers_to_nobody_are_refused(name, chatml):
    row, message = NO_WEIGHT_OR_QUESTION[name]
    with pytest.raises(BadRow, match=message):
        run([row], chatml)


def test_a_system_turn_before_a_history_is_an_answer_to_somebody(chatml):
    samples, _ = run([{"prompt": [SYSTEM], "completion": "Hello", "history": [["Hi", "Hello"]]}], chatml)
    assert trained(samples[0], chatml) == "Hello<|im_end|>"
