"""Preference rows: the reading of each shape, the refusals, and what becomes of rows on the way to a batch."""

import json

import pytest
import torch
from chatml import CHATML

from lightning_peft.data.audit import Audit
from lightning_peft.data.config import DataConfig, Format, Layout, OnBadRow, OnTooLong, RowKind
from lightning_peft.data.conversation import BadRow, Row
from lightning_peft.data.datamodule import SFTDataModule
from lightning_peft.data.preferences import Standing
from lightning_peft.data.row_reader import row_reader
from lightning_peft.data.samples import UnreadError, encode_rows
from lightning_peft.data.token_store import Samples

USER, YES, NO = {"role": "user", "content": "Hi"}, *({"role": "assistant", "content": x} for x in ("Hello", "there"))
SYSTEM = {"role": "system", "content": "Be brief"}
SHAPES = [
    ({"prompt": "Hi", "chosen": "Hello", "rejected": "there"}, {}, ["Hi"]),
    ({"question": "Hi", "chosen": "Hello", "rejected": "there"}, {"prompt_column": "question"}, ["Hi"]),
    ({"prompt": "Hi", "good": "Hello", "bad": "there"}, {"chosen_column": "good", "rejected_column": "bad"}, ["Hi"]),
    ({"prompt": [USER], "chosen": [YES], "rejected": [NO]}, {}, ["Hi"]),
    ({"prompt": [SYSTEM, USER], "chosen": "Hello", "rejected": "there"}, {}, ["Be brief", "Hi"]),
    ({"chosen": [USER, YES], "rejected": [USER, NO]}, {}, ["Hi"]),
    ({"prompt": "Hi", "chosen": [USER, YES], "rejected": [USER, NO]}, {}, ["Hi"]),
    ({"prompt": "Hi", "chosen": [YES], "rejected": [NO], "system": "Be brief"}, {}, ["Be brief", "Hi"]),
    ({"chosen": [USER, YES, USER, YES], "rejected": [USER, YES, USER, NO]}, {}, ["Hi", "Hello", "Hi"]),
    ({"chosen": "Hi there: Hello", "rejected": "Hi there: there"}, {"layout": Layout.raw}, ["Hi there:"]),
    ({"chosen": "Hello", "rejected": "there", "a": "Hi"}, {"prompt_template": "{{ a }}"}, ["Hi"]),
]


def read(values, rows=RowKind.pairs, **options):
    config = DataConfig(rows=rows, **options)
    return row_reader(values, config)(Row(values, "a.jsonl line 3"))


@pytest.mark.parametrize(("values", "options", "context"), SHAPES)
def test_both_answers_stand_behind_the_same_prompt(values, options, context):
    found = read(values, **options)
    assert [message.content for message in found[:-1]] == context
    assert found[:-1] == found.rejected[:-1] and found.first_trained == len(context)
    assert (found[-1].content.strip(), found.rejected[-1].content.strip()) == ("Hello", "there")
    assert found.unread == ()


def test_tools_and_unread_columns_are_as_in_other_rows():
    tool = {"type": "function", "function": {"name": "f"}}
    found = read({"prompt": "Hi", "chosen": "Hello", "rejected": "there", "tools": [tool], "note": "x", "score_a": 2})
    assert found.tools == found.rejected.tools == [tool]
    assert (found.unread, found.listed) == (("column 'note'",), ("column 'score_a'",))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"prompt": "Hi", "chosen": "", "rejected": "b"},
            "column 'chosen': expected non-empty text, or a list of turns",
        ),
        ({"prompt": "Hi", "chosen": "a", "rejected": None}, "column 'rejected': expected non-empty text"),
        (
            {"prompt": "Hi", "chosen": "a", "rejected": [NO]},
            "expected chosen and rejected both as text, or both as lists",
        ),
        ({"chosen": "a", "rejected": "b"}, "expected a prompt beside plain texts of chosen and rejected"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "column 'prompt': expected non-empty text"),
        ({"prompt": "Who", "chosen": [USER, YES], "rejected": [USER, NO]}, "expected turns that begin with the row's"),
        (
            {"chosen": [USER, YES], "rejected": [{**USER, "content": "Ho"}, NO]},
            "expected a user message before the ans",
        ),
        ({"chosen": [USER], "rejected": [USER, NO]}, "a user message before the answers"),
        (
            {"chosen": [USER, NO], "rejected": [{**USER, "content": "Another"}, NO]},
            "before the answers, the same in chosen and rejected, got 'An",
        ),
        ({"prompt": "Hi", "chosen": [{**YES, "weight": 0.5}], "rejected": [NO]}, "expected turns of weight 0 or 1"),
    ],
)
def test_bad_row_is_named_with_its_place(values, message):
    with pytest.raises(BadRow, match=f"a.jsonl line 3.*{message}"):
        read(values)


@pytest.mark.parametrize(("value", "wanted"), [(True, True), (0, False), ("true", True), ("False", False), (1.0, True)])
def test_label_says_whether_an_answer_is_wanted(value, wanted):
    assert read({"prompt": "Hi", "completion": "Hello", "label": value}, RowKind.labelled).wanted is wanted


@pytest.mark.parametrize("value", [None, "good", 2, [True]])
def test_label_that_is_none_is_a_bad_row(value):
    with pytest.raises(BadRow, match="column 'label': expected true or false"):
        read({"prompt": "Hi", "completion": "Hello", "label": value}, RowKind.labelled)


ANSWERS, PAIRS, LABELLED = (
    {"prompt": "Hi", "completion": "Hello"}, SHAPES[0][0], {"prompt": "Hi", "completion": "Hello", "label": True},
)  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "values", "options", "message"),
    [
        (
            RowKind.answers,
            PAIRS,
            {},
            "chosen and rejected answers: objective=dpo .* trains on them; objective=sft .or distill. takes",
        ),
        (RowKind.pairs, ANSWERS, {}, "objective=dpo .* takes pairs of chosen .*; these are for objective=sft"),
        (RowKind.pairs, LABELLED, {}, "objective=dpo .* takes pairs of chosen .*; these are for objective=kto"),
        (
            RowKind.labelled,
            PAIRS,
            {},
            "chosen and rejected answers: objective=dpo .* trains on them; objective=kto takes",
        ),
        (RowKind.labelled, ANSWERS, {}, "objective=kto takes answers with a label; these are for objective=sft"),
        (RowKind.pairs, {"a": 1}, {}, "no pairs of answers, the columns are a; name them with data.chosen_column"),
        (RowKind.answers, ANSWERS, {"chosen_column": "completion"}, "data.chosen_column=completion: names a column of"),
        (
            RowKind.pairs,
            PAIRS,
            {"format": Format.messages},
            "data.format=messages: objective=dpo .* objective=sft .or distill. trains",
        ),
        (
            RowKind.pairs,
            PAIRS,
            {"prompt_column": "question"},
            "data.prompt_column=question: the rows have no such column",
        ),
    ],
)
def test_rows_of_another_objective_are_refused_with_its_name(rows, values, options, message):
    with pytest.raises(ValueError, match=message):
        row_reader(values, DataConfig(rows=rows, **options))


def test_one_answer_of_a_pair_may_be_trained_by_name():
    options = {"completion_column": "chosen", "ignore_columns": ["rejected"]}
    found = read(PAIRS, RowKind.answers, **options)
    assert [message.content for message in found] == ["Hi", "Hello"] and found.unread == ()


def encoded(rows, tokenizer, kind=RowKind.pairs, **options):
    audit = Audit()
    config = DataConfig(rows=kind, **options)
    rows = [Row(values, f"line {number}") for number, values in enumerate(rows, 1)]
    return Samples.of(encode_rows(rows, config, tokenizer, audit), kind.samples), audit


def test_a_label_beside_answers_names_the_objective_that_reads_it(make_tokenizer):
    with pytest.raises(UnreadError, match=r"column 'label' \(1 rows\).*; objective=kto trains on answers with a label"):
        encoded([LABELLED], make_tokenizer(CHATML), RowKind.answers)


def test_answers_are_labelled_as_they_are_for_sft(make_tokenizer):
    tokenizer = make_tokenizer(CHATML)
    pairs, audit = encoded([PAIRS, PAIRS | {"rejected": "there there"}], tokenizer)
    for column, place in (("chosen", 0), ("rejected", 1)):
        alone, _ = encoded([{"prompt": "Hi", "completion": PAIRS[column]}], tokenizer, RowKind.answers)
        sample = pairs.unit(0)[place]
        assert (sample.input_ids, sample.labels) == (alone[0].input_ids, alone[0].labels)
        assert sample.standing is Standing[column]
    assert audit.preferences["pairs"] == 2 and audit.samples == 4 and len(pairs.unit_lengths) == 2


def test_mismatched_samples_have_the_answer_of_the_row_before(make_tokenizer):
    rows = [{"prompt": word, "completion": word, "label": True} for word in ("one", "two", "three")]
    tokenizer = make_tokenizer(CHATML)
    samples, audit = encoded(rows, tokenizer, RowKind.labelled)
    texts = [tokenizer.decode([x for x in samples.unit(i)[1].labels if x >= 0]) for i in range(3)]
    assert ["three" in texts[0], "one" in texts[1], "two" in texts[2]] == [True] * 3
    assert samples.unit(0)[1].standing is Standing.mismatched
    assert audit.preferences == {"wanted": 3} and audit.samples == 3
    assert "every answer is wanted: a preference needs both" in audit.warnings()


def test_audit_counts_lengths_ties_prefixes_cuts_and_copies(make_tokenizer):
    rows = [PAIRS, {**PAIRS, "rejected": "Hello"}, {**PAIRS, "chosen": "there Hello four", "rejected": "there one"}]
    _, audit = encoded(rows, make_tokenizer(CHATML))
    found = audit.preferences
    assert (found["pairs"], found["ties"], found["chosen_longer"]) == (3, 1, 1)
    assert found["shared_tokens"] >= 2 and found["chosen_tokens"] > found["pairs"]
    assert any(line.startswith("3 pairs: chosen answers of ") for line in audit.lines())
    assert "1 of 3 pairs have the same tokens in both answers: nothing to prefer" in audit.warnings()
    _, audit = encoded([PAIRS | {"rejected": "one two three four " * 9}], make_tokenizer(CHATML), max_length=40)
    assert audit.truncated == 1 and audit.lost > 0


def test_a_pair_is_kept_or_skipped_as_a_whole(make_tokenizer):
    rows = [PAIRS | {"rejected": "one two three four " * 9}, {"prompt": "Hi", "chosen": "", "rejected": "b"}, PAIRS]
    options = {"on_too_long": OnTooLong.skip, "on_bad_row": OnBadRow.skip, "max_length": 40}
    samples, audit = encoded(rows, make_tokenizer(CHATML), **options)
    assert len(samples.unit_lengths) == 1 and (audit.skipped_long, audit.bad_rows) == (1, 1)


def module(folder, tokenizer, **options):
    rows = [{"prompt": "one " * (n % 3 + 1), "chosen": "two " * (n % 4 + 1), "rejected": "four"} for n in range(24)]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(
        rows=RowKind.pairs, train_path=str(path), validation_fraction=0, max_length=48, micro_batch_size=2, **options
    )
    data = SFTDataModule(config, tokenizer, seed=0)
    data.setup()
    return data


@pytest.mark.parametrize("packing", [True, False])
def test_batches_hold_whole_pairs_whose_samples_are_apart(packing, tmp_path, make_tokenizer):
    data = module(tmp_path, make_tokenizer(CHATML), packing=packing, cache_dir=None)
    pairs = 0
    for batch in data.train_dataloader():
        assert batch.standings.view(-1, 2).tolist() == [[Standing.chosen, Standing.rejected]] * batch.num_units
        assert batch.input_ids.shape[1] == 96 if packing else batch.input_ids.shape[1] <= 48
        starts = batch.position_ids.flatten()[batch.cu_seqlens[:-1].long()]
        assert starts.eq(0).all() and torch.equal(
            batch.cu_seqlens[:-1].diff() > 0, torch.ones(2 * batch.num_units - 1) > 0
        )
        pairs += batch.num_units
    assert pairs == 24


def test_cached_and_streamed_pairs_are_those_of_memory(tmp_path, make_tokenizer):
    tokenizer = make_tokenizer(CHATML)
    plain = module(tmp_path, tokenizer, cache_dir=None)
    made, mapped = (module(tmp_path, tokenizer, cache_dir=str(tmp_path / "cache")) for _ in range(2))
    assert plain.fingerprint == made.fingerprint == mapped.fingerprint
    assert mapped.training_samples.unit(3) == plain.training_samples.unit(3)
    assert mapped.train_audit.preferences == plain.train_audit.preferences and plain.train_audit.repeated == 12
    streamed = module(tmp_path, tokenizer, cache_dir=None, streaming=True, shuffle_window=10)
    batches = list(streamed.train_dataloader())
    assert sum(batch.num_units for batch in batches) == 24
    assert sum(batch.num_supervised for batch in batches) == plain.train_audit.supervised


def test_row_read_behind_a_full_block_has_the_answer_of_the_block(make_tokenizer, monkeypatch):
    """A last row alone in its block would have its own answer for another's, and no distance to the reference."""
    words = ("one", "two", "three", "four", "Hello")
    rows = [Row({"prompt": "Hi", "completion": word, "label": True}, f"line {word}") for word in words]
    config, tokenizer, audit = DataConfig(rows=RowKind.labelled), make_tokenizer(CHATML), Audit()
    monkeypatch.setattr("lightning_peft.data.samples.ROWS_AT_ONCE", 4)
    samples = list(encode_rows(rows, config, tokenizer, audit))
    texts = [tokenizer.decode([label for label in sample.labels if label >= 0]) for sample in samples]
    assert ["Hello" in texts[8], "four" in texts[9], "four" in texts[1]] == [True] * 3
    assert audit.without_others == 0
    alone = Audit()
    list(encode_rows(rows[:1], config, tokenizer, alone))
    assert any(line.startswith("1 rows were read alone, so that the distance") for line in alone.warnings())
