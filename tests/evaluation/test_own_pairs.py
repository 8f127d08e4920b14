"""Pairs of a model's own wrong answers: the pairs made, the counts, and the command on a run made here."""

import json
import re
import shlex

import pytest
from tiny_runs import tiny_config

from lightning_peft.__main__ import main
from lightning_peft.commands.pairs import pairs
from lightning_peft.commands.train import train
from lightning_peft.compose import compose_config
from lightning_peft.data.config import DataConfig, RowKind
from lightning_peft.data.conversation import Conversation, Message
from lightning_peft.data.layout import PromptLayout
from lightning_peft.data.samples import read_conversations
from lightning_peft.evaluation.own_pairs import Asked, Chosen, Counts, pair_row, pairs_of, without_repeats
from lightning_peft.tasks.text_to_sql.execution_accuracy import TASK

QUESTION = Conversation([Message("user", "Say as many as asked.")])


def asked(*answers, right="aaaa"):
    return Asked({"prompt": "Say", "completion": right}, QUESTION, list(answers))


def letters(row, answer):
    return float(answer.count("a"))


def test_worst_answers_come_first_and_among_equals_the_most_frequent():
    row = asked("a", "b", "aaaaa", "c ", "c", "aa", "", "")
    counts = Counts()
    assert pairs_of(row, letters, 3, Chosen.row, counts) == [("aaaa", "c "), ("aaaa", "b"), ("aaaa", "a")]
    assert (counts.as_good, counts.repeated, counts.empty, counts.over_limit, counts.pairs) == (1, 2, 1, 1, 3)
    assert counts.prompts_with_pairs == 1 and counts.own_chosen == 0


@pytest.mark.parametrize(("answers", "chosen"), [(["aaaa", "b"], "aaaa"), (["aaaaaa", "b"], "aaaaaa"), (["a"], "AAAA")])
def test_best_own_answer_is_chosen_where_it_is_as_good(answers, chosen):
    counts = Counts()
    row = asked(*answers, right="AAAA")
    found = pairs_of(row, lambda _, answer: float(answer.lower().count("a")), 1, Chosen.best, counts)
    assert found == [(chosen, answers[-1])] and counts.own_chosen == (chosen in answers)


def test_prompt_without_a_right_answer_of_the_models_own_has_no_pair():
    counts = Counts()
    assert pairs_of(asked("a", "b", ""), letters, 3, Chosen.own, counts) == [] and counts.unmatched == 2
    assert pairs_of(asked("a", "aaaaa"), letters, 3, Chosen.own, counts) == [("aaaaa", "a")]
    assert (counts.pairs, counts.own_chosen, counts.prompts_with_pairs, counts.empty) == (1, 1, 1, 1)


@pytest.mark.parametrize("takes", Chosen)
def test_every_answer_is_counted_once(takes):
    counts = Counts()
    for answers in (["a", "a", "b"], ["", "", "aaaa", "aaaaa"], ["aaaa"], ["b", "c", "d", "b"]):
        pairs_of(asked(*answers), letters, 2, takes, counts)
    told = counts.as_good + counts.repeated + counts.empty + counts.unmatched + counts.over_limit + counts.pairs
    assert told == counts.answers == 12


def test_rows_that_ask_the_same_are_asked_once():
    counts = Counts()
    found = without_repeats([asked(), asked(), asked(right="b")], counts)
    assert [each.row["completion"] for each in found] == ["aaaa", "b"]
    assert (counts.prompts, counts.same_prompts) == (2, 1)


CALL = {"type": "function", "function": {"name": "find", "arguments": {"word": "x"}}}
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize(
    "conversation",
    [
        QUESTION,
        Conversation([Message("system", "Be short."), *QUESTION]),
        Conversation([*QUESTION, Message("assistant", "Why?", reasoning="Hm."), Message("user", "So.")]),
        Conversation(
            [*QUESTION, Message("assistant", "", tool_calls=(CALL,)), Message("tool", "1", name="find")], [TOOL]
        ),
    ],
    ids=["question", "system", "turns", "tools"],
)
def test_row_is_read_as_the_same_prompt_with_both_answers(conversation, tmp_path):
    row = pair_row(Asked({"completion": "right", "level": "easy"}, conversation), "right", "wrong", ["level", "seed"])
    assert row["level"] == "easy"
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row) + "\n")
    config = DataConfig(train_path=str(path), validation_fraction=0.0, rows=RowKind.pairs)
    ((_, found),) = read_conversations(config, "train", tokenizer=None)

    def said(messages):
        return [(m.role, m.content, m.reasoning, m.tool_calls, m.name) for m in messages]

    assert said(found) == said([*conversation, Message("assistant", "right")])
    assert said(found.rejected) == said([*conversation, Message("assistant", "wrong")])
    assert found.tools == conversation.tools and not found.unread


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs") / "run"
    train(tiny_config(folder, "trainer.max_steps=2"))
    return folder


def words(run, output, *more):
    return [f"adapter_path={run}", f"output={output}", "max_rows=5", "samples=2", "max_new_tokens=8", *more]


def test_command_writes_pairs_that_dpo_goes_on_with(run, tmp_path, capsys):
    report = pairs(compose_config("pairs", words(run, tmp_path / "pairs.jsonl")))
    [ignored] = [word for word in shlex.split(capsys.readouterr().out) if word.startswith("data.ignore_columns=")]
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert report["prompts"] == 5 and report["answers"] == 10 and report["pairs"] == len(rows) > 0
    assert json.loads((tmp_path / "pairs.json").read_text()) == report
    for row in rows:
        scored = row | {"prompt": row["prompt"][-1]["content"], "completion": row["chosen"]}
        assert TASK.is_right(scored, row["chosen"]) and not TASK.is_right(scored, row["rejected"])
    pairs(compose_config("pairs", words(run, tmp_path / "again.jsonl")))
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "pairs.jsonl").read_bytes()
    pairs(compose_config("pairs", words(run, tmp_path / "other.jsonl", "seed=7")))
    assert (tmp_path / "other.jsonl").read_bytes() != (tmp_path / "pairs.jsonl").read_bytes()
    data = ["objective=dpo", "data=jsonl", f"data.train_path={tmp_path}/pairs.jsonl", ignored]
    data += ["data.validation_fraction=0.25"]
    result = train(tiny_config(tmp_path / "dpo", *data, f"adapter.init_from={run}", "trainer.max_steps=1"))
    assert result["metrics"]["validation_logps/rejected"] < 0


def test_metric_of_ones_own_scores_by_degree(run, tmp_path, monkeypatch):
    (tmp_path / "own_pairs_metric.py").write_text("def length(rows, answers): return len(answers[0])\n")
    monkeypatch.syspath_prepend(tmp_path)
    more = ["metric=own_pairs_metric:length", "chosen=best", "data=text_to_sql"]
    pairs(compose_config("pairs", words(run, tmp_path / "pairs.jsonl", *more)))
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert rows and all(len(row["chosen"]) > len(row["rejected"]) for row in rows)
    assert all(set(row) == {"prompt", "chosen", "rejected"} for row in rows)


WRONG = {
    "samples=0": r"samples=0: must be at least 1",
    "temperature=-1": r"temperature=-1.0: must be 0",
    "temperature=0": r"samples=2 temperature=0: gives one answer so many times; use samples=1",
    "output=pairs.csv": r"output=pairs.csv: must end in .jsonl",
    "output=/no/such/p.jsonl": r"output=/no/such/p.jsonl: there is no folder /no/such",
    "metric=bleu": r"metric=bleu: no such metric; choose one of execution_accuracy, ",
    "metric=text_to_sql": r"metric=text_to_sql: names a task; give one of execution_accuracy",
    "metric=no_module:f": r"metric=no_module:f: cannot be imported",
    "adapter_path=/no/run": r"adapter_path=/no/run: no such folder",
}


@pytest.mark.parametrize("word", WRONG)
def test_wrong_words_are_said_in_a_line(word, run, tmp_path, capfd):
    assert main(["pairs", *words(run, tmp_path / "p.jsonl", word)]) == 2
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert re.search(WRONG[word], said), said
    assert not (tmp_path / "p.jsonl").exists()


def test_rows_that_nothing_scores_are_refused(run, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    own = ["data=jsonl", f"data.train_path={path}"]
    with pytest.raises(ValueError, match="data.task=none: scores no answers; give metric=, as metric=module:function"):
        pairs(compose_config("pairs", words(run, tmp_path / "p.jsonl", *own)))
    with pytest.raises(ValueError, match="metric=execution_accuracy: needs the columns schema, seed, level"):
        pairs(compose_config("pairs", words(run, tmp_path / "p.jsonl", *own, "metric=execution_accuracy")))


def test_no_worse_answer_makes_no_pair_and_no_file(run, tmp_path, monkeypatch):
    (tmp_path / "own_pairs_same.py").write_text("def same(rows, answers): return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="no answer is worse than the chosen ones, so there are no pairs"):
        pairs(compose_config("pairs", words(run, tmp_path / "p.jsonl", "metric=own_pairs_same:same")))
    assert not (tmp_path / "p.jsonl").exists()


def test_words_for_dpo_lay_out_prompts_as_they_were_asked(tmp_path, capsys):
    rows = [{"prompt": f"say {n} ", "completion": "a" * 9} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["data=jsonl", f"data.train_path={tmp_path}/rows.jsonl", "data.layout=raw", "data.validation_fraction=0.25"]
    train(tiny_config(tmp_path / "raw", *data, "trainer.max_steps=1"))
    found = [f"adapter_path={tmp_path}/raw", f"output={tmp_path}/p.jsonl", "max_rows=4", "samples=1"]
    (tmp_path / "own_a.py").write_text("def letters(rows, answers): return answers[0].count('a')\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        pairs(compose_config("pairs", [*found, "metric=own_a:letters", "max_new_tokens=3"]))
    said = capsys.readouterr().out.splitlines()[-1]
    words_of_it = shlex.split(said.removesuffix(" trains on them"))
    assert "data.layout=raw" in [word.replace('"', "") for word in words_of_it]
    dpo = [
        *words_of_it[2:],
        "model=tiny",
        "trainer.max_steps=1",
        "trainer.accelerator=cpu",
        "data.validation_fraction=0.5",
    ]
    assert main(["train", *dpo, f"run_dir={tmp_path}/dpo"]) == 0
    layouts = [PromptLayout.load(tmp_path / name / "adapter") for name in ("raw", "dpo")]
    assert layouts[0] == layouts[1] and "the prompts of this run are" not in capsys.readouterr().err
    other = [word for word in dpo if "layout" not in word]
    assert main(["train", *other, f"run_dir={tmp_path}/chat"]) == 0
    assert "the prompts of this run are laid out as chat, and were as raw" in capsys.readouterr().err
