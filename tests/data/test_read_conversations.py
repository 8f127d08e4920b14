"""Rows that are asked again, in samples, metrics and scores, are those that the audit counts: no bad row among them."""

import json

import pytest

from lightning_peft.__main__ import main
from lightning_peft.data.audit import Audit
from lightning_peft.data.config import DataConfig, OnBadRow, RowKind
from lightning_peft.data.conversation import BadRow
from lightning_peft.data.layout import PromptLayout
from lightning_peft.data.prompt_rows import prompts_of
from lightning_peft.data.samples import first_samples, make_samples, read_conversations
from lightning_peft.models.tiny import tiny_tokenizer

GOOD = [{"prompt": f"Q{n}", "completion": f"It is {n}"} for n in range(6)]
CUT = {"prompt": "cut \ud83d", "completion": "It is 7"}
CUT_ANSWER = {"prompt": "Q", "completion": "cut \ud83d"}
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}"
    "{% endif %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def turns(*said):
    return {"messages": [{"role": role, "content": text} for role, text in said]}


def options(path, **more):
    return DataConfig(train_path=path, validation_path=path, **{"system_prompt": None} | more)


@pytest.fixture
def alternating():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = ALTERNATING
    return tokenizer


@pytest.mark.parametrize("bad", [CUT, CUT_ANSWER])
@pytest.mark.parametrize("place", [0, 3])
def test_row_the_tokenizer_refuses_is_skipped_as_in_the_audit(bad, place, write_jsonl):
    path, tokenizer = write_jsonl([*GOOD[:place], bad, *GOOD[place:]]), tiny_tokenizer()
    config = options(path, on_bad_row=OnBadRow.skip)
    audit = Audit()
    found = read_conversations(config, "validation", tokenizer=tokenizer, audit=audit)
    assert [row for row, _ in found] == GOOD
    assert audit.warnings()[0].startswith(f"1 of 7 rows are skipped (data.on_bad_row=skip): {path} line {place + 1}")
    assert audit.bad_rows == make_samples(config, "validation", tokenizer)[1].bad_rows
    few = read_conversations(config, "validation", 4, tokenizer=tokenizer)
    assert [row for row, _ in few] == GOOD[:4]
    with pytest.raises(BadRow, match=f"line {place + 1}: expected UTF-8 text"):
        read_conversations(options(path), "validation", tokenizer=tokenizer)


def test_row_the_template_refuses_names_its_line(alternating, write_jsonl):
    good = turns(("user", "Hi"), ("assistant", "Hello"))
    path = write_jsonl([good, turns(("user", "a"), ("user", "b"), ("assistant", "x")), good])
    found = read_conversations(options(path, on_bad_row=OnBadRow.skip), "validation", tokenizer=alternating)
    assert [conversation.origin for _, conversation in found] == [f"{path} line 1", f"{path} line 3"]
    with pytest.raises(BadRow, match="line 2: the chat template refuses a conversation .*alternate"):
        read_conversations(options(path), "validation", tokenizer=alternating)


def test_rejected_answer_makes_its_row_a_bad_one(write_jsonl):
    good = {"prompt": "Hi", "chosen": "a", "rejected": "b"}
    path = write_jsonl([good, good | {"rejected": "cut \ud83d"}])
    config = options(path, rows=RowKind.pairs, on_bad_row=OnBadRow.skip)
    assert len(read_conversations(config, "train", tokenizer=tiny_tokenizer())) == 1


def test_prompt_of_a_row_in_another_layout_names_the_row(alternating, write_jsonl):
    """An adapter's own template may refuse what that of the rows' options takes."""
    path = write_jsonl([turns(("system", "Be brief"), ("user", "Hi"), ("assistant", "Hello"))])
    ((_, found),) = read_conversations(options(path), "validation", tokenizer=tiny_tokenizer())
    with pytest.raises(BadRow, match="line 1: the chat template refuses"):
        prompts_of([found.before(2)], PromptLayout(template=ALTERNATING), alternating)


@pytest.mark.parametrize(
    "rows",
    [GOOD, [{"text": f"Story {n}"} for n in range(6)], [{"input_ids": [5, 6, 7 + n]} for n in range(6)]],
    ids=["prompts", "text", "tokens"],
)
def test_first_samples_are_those_of_training(rows, write_jsonl):
    config, tokenizer = options(write_jsonl(rows)), tiny_tokenizer()
    samples, _ = make_samples(config, "validation", tokenizer)
    found = first_samples(config, "validation", tokenizer, 4)
    assert [list(sample.input_ids) for sample in found] == [list(samples[place].input_ids) for place in range(4)]


def test_bad_validation_rows_are_skipped_by_every_command(tmp_path, write_jsonl, capsys):
    train, validation = write_jsonl(GOOD * 4), write_jsonl([CUT, *GOOD[:3], CUT_ANSWER, *GOOD[3:]], "validation.jsonl")
    words = [f"data={train}", f"data.validation_path={validation}", "data.on_bad_row=skip", "data.cache_dir=null"]
    run = [f"run_dir={tmp_path / 'run'}", "trainer.max_steps=2", "validation.every_n_steps=1", "model=tiny"]
    metrics = ["validation.metrics=[final_number]", "validation.max_new_tokens=4", "trainer.precision=32-true"]
    assert main(["train", *words, *run, *metrics]) == 0
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {sample["reference"] for sample in samples} <= {row["completion"] for row in GOOD}
    assert "final_number_accuracy 0 of 6 validation rows" in capsys.readouterr().err
    adapter = f"adapter_path={tmp_path / 'run'}"
    assert main(["evaluate", adapter, *words, "data.task=final_number", "models=adapter", "precision=32-true"]) == 0
    report = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert report["rows"] == 6
    assert main(["merge", adapter, f"output={tmp_path / 'merged'}"]) == 0
