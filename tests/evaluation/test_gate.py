"""A gate says ship or do not ship, and its exit status says the same; the harness scores base and adapter alike."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import tiny_config

from lightning_peft.__main__ import main
from lightning_peft.commands.train import train
from lightning_peft.evaluation.gate import Metric, bootstrap, row_scores, scores_by_source, verdicts
from lightning_peft.tasks.registry import TASKS
from lightning_peft.tasks.task import Task
from lightning_peft.tasks.text_to_sql.execution_accuracy import TASK as TEXT_TO_SQL


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gate") / "run"
    train(tiny_config(folder, "trainer.max_steps=8", "data.packing=false"))
    return folder


def evaluated(run_dir: Path, *words: str) -> int:
    try:
        return main(["evaluate", f"adapter_path={run_dir}", "max_rows=4", "samples=0", *words])
    except SystemExit as left:
        return int(left.code or 0)


def test_gate_ships_and_does_not_ship(run_dir, capsys):
    assert evaluated(run_dir, "gate={loss:0.01,execution_accuracy:-0.02}") == 0
    printed = capsys.readouterr().out
    assert "loss: +0." in printed and printed.splitlines()[-1] == "ship"
    report = json.loads((run_dir / "evaluation.json").read_text())
    assert report["ship"] is True
    improvement = report["base"]["loss"] - report["adapter"]["loss"]
    assert report["gate"]["loss"]["improvement"] == pytest.approx(improvement) and improvement > 0.01
    assert evaluated(run_dir, "gate={loss:5,execution_accuracy:-0.02}") == 4
    assert "asked for at least +5: fails" in capsys.readouterr().out
    assert json.loads((run_dir / "evaluation.json").read_text())["ship"] is False


WRONG = {
    "gate={loss_per_token:0.1}": "gate.loss_per_token=0.1: is not scored; choose one of loss, perplexity, exec",
    "gate={preference_accuracy:0.1}": "gate.preference_accuracy=0.1: is not scored",
    "gate={loss:nan}": "gate.loss=nan: must be a finite number",
    "gate={bleu:0.1}": "gate.bleu=0.1: is not scored; choose one of loss, perplexity, execution_accuracy",
    "models=adapter gate={loss:0}": "gate: compares an adapter with its base",
    "benchmark=helm": "benchmark=helm: must be lm_eval",
    "tasks=[arc_easy]": "is of benchmark=lm_eval, which is to be given too",
    "benchmark_limit=10": "benchmark_limit=10: is of benchmark=lm_eval, which is to be given too",
    "num_fewshot=0": "num_fewshot=0: is of benchmark=lm_eval",
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_gate_is_named(run_dir, words, capsys):
    assert evaluated(run_dir, *words.split(" ")) == 2
    assert WRONG[words] in capsys.readouterr().err


def test_interval_is_that_of_the_mean_of_differences():
    rng = np.random.default_rng(1)
    base, own = rng.integers(0, 2, 400).astype(float), np.ones(400)
    own[:40] = 0
    (found,) = verdicts({"m": 0.3}, {"m": Metric(base.mean(), base.tolist())}, {"m": Metric(own.mean(), own.tolist())})
    differences = own - base
    assert found.improvement == pytest.approx(differences.mean())
    spread = 1.96 * differences.std(ddof=1) / 20
    expected = (differences.mean() - spread, differences.mean() + spread)
    assert found.interval == pytest.approx(expected, abs=0.006)  # the bootstrap's own noise, and no normal law
    assert found.passes == (found.interval[0] >= 0.3)


def test_not_enough_rows_are_told_from_a_failure():
    few = Metric(0.5, [0.0, 1.0, 0.0, 1.0]), Metric(0.75, [1.0, 1.0, 0.0, 1.0])
    (found,) = verdicts({"m": 0.1}, {"m": few[0]}, {"m": few[1]})
    assert not found.passes and "not shown, more rows would tell" in found.words()
    (lost,) = verdicts({"m": 0.9}, {"m": few[0]}, {"m": few[1]})
    assert lost.words().endswith("fails")


def test_small_is_good_turns_the_sign():
    (found,) = verdicts({"e": 0.0}, {"e": Metric(2.0, [], True)}, {"e": Metric(1.5, [], True)})
    assert (found.improvement, found.interval, found.passes) == (0.5, None, True)


def test_only_means_over_rows_have_an_interval():
    def score(rows, answers):
        right = [float(row["completion"] == answer) for row, answer in zip(rows, answers, strict=True)]
        return {"exact": sum(right) / len(right), "odd": sum(right) / (1 + len(right))}

    task = Task("t", score, "exact", 4)
    rows, answers = [{"completion": "a"}, {"completion": "b"}, {"completion": "c"}], ["a", "x", "c"]
    assert row_scores(task, rows, answers) == (score(rows, answers), {"exact": [1.0, 0.0, 1.0]})
    assert bootstrap([1.0]) is None and bootstrap([1.0, math.nan, 1.0]) == (1.0, 1.0)


def test_scores_of_a_source_are_those_of_its_rows_alone():
    """One task is a mean over rows, one is scored as a whole."""
    rows = [{"completion": f"so #### {number}"} for number in range(6)]
    answers, sources = ["0", "2", "2", "3", "5", "5"], ["a", "b", "a", "a", "b", "a"]
    for task in (TASKS["final_number"], replace(TASKS["final_number"], is_mean_of_rows=False)):
        _, by_row = row_scores(task, rows, answers)
        metrics, values = scores_by_source(task, rows, answers, sources, by_row)
        for source in "ab":
            places = [place for place in range(6) if sources[place] == source]
            alone, own = row_scores(task, [rows[place] for place in places], [answers[place] for place in places])
            assert {f"{name}/{source}": value for name, value in alone.items()}.items() <= metrics.items()
            assert {f"{name}/{source}": value for name, value in own.items()}.items() <= values.items()
        assert metrics == {"final_number_accuracy/a": 1.0, "final_number_accuracy/b": 0.0}
        assert scores_by_source(task, rows, answers, [""] * 6, by_row) == ({}, {})


TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.filterwarnings("ignore")  # the harness's own
def test_harness_scores_base_and_adapter_on_a_local_task(run_dir, tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="pip install 'lightning-peft[lm_eval]' brings it")
    rows = [{"question": f"{i} or {i + 1}?", "choices": [f" {i}", " so"], "answer": i % 2} for i in range(12)]
    (tmp_path / "rows.json").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "tiny_choice.yaml").write_text(TASK.format(path=tmp_path / "rows.json"))
    words = ["benchmark=lm_eval", "tasks=[tiny_choice]", f"tasks_path={tmp_path}"]
    assert evaluated(run_dir, *words, "gate={tiny_choice/acc:-1}") == 0
    report = json.loads((run_dir / "evaluation.json").read_text())
    for name in ("base", "adapter"):
        assert report[name]["metrics"]["tiny_choice/acc"] == pytest.approx(accuracy_by_hand(run_dir, rows, name))
        assert len(report[name]["intervals"]["tiny_choice/acc"]) == 2
    assert "tiny_choice/acc" in capsys.readouterr().out


@pytest.mark.slow  # the harness indexes ten thousand files
def test_task_that_the_harness_lacks_is_named(run_dir, capsys):
    pytest.importorskip("lm_eval", reason="pip install 'lightning-peft[lm_eval]' brings it")
    assert evaluated(run_dir, "benchmark=lm_eval", "tasks=[no_such_task]") == 2
    assert "tasks=no_such_task: the harness has no such task" in capsys.readouterr().err


def accuracy_by_hand(run_dir: Path, rows: list[dict], name: str) -> float:
    """Return whether the choice with the higher log-likelihood, summed from the model's logits, is right."""
    from lightning_peft.adapters.inject import disable_adapters
    from lightning_peft.commands.adapted import load_for_inference

    model, tokenizer = load_for_inference(str(run_dir), None, "auto")
    right = 0
    for row in rows:
        sums = []
        for choice in row["choices"]:
            start = tokenizer(row["question"], add_special_tokens=False)["input_ids"]
            whole = tokenizer(row["question"] + choice, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                if name == "base":
                    with disable_adapters(model):
                        logits = model(torch.tensor([whole])).logits[0]
                else:
                    logits = model(torch.tensor([whole])).logits[0]
            logs = logits.float().log_softmax(-1)
            sums.append(sum(float(logs[i - 1, whole[i]]) for i in range(len(start), len(whole))))
        right += int(max(range(2), key=lambda i: sums[i]) == row["answer"])
    return right / len(rows)


def test_row_is_scored_once_where_metrics_are_means_of_rows():
    rows = list(TEXT_TO_SQL.own_rows.make("test", 0, 6, "answers"))
    answers = [row["completion"] if i % 2 else "no query" for i, row in enumerate(rows)]
    asked = []

    def score(some, given):
        asked.append(len(some))
        return TEXT_TO_SQL.score(some, given)

    metrics, by_row = row_scores(replace(TEXT_TO_SQL, score=score), rows, answers)
    assert asked == [1] * 6
    assert metrics == TEXT_TO_SQL.score(rows, answers) and by_row["execution_accuracy"] == [0.0, 1.0] * 3


def test_scores_stay_where_a_gate_names_what_these_rows_lack(run_dir, monkeypatch, capsys):
    """A task may name a metric that its rows turn out not to have."""
    output = run_dir / "kept.json"
    words = ["gate={execution_accuracy/unheard:0}", f"output={output}"]
    named = replace(TEXT_TO_SQL, metrics=(*TEXT_TO_SQL.metrics, "execution_accuracy/unheard"))
    monkeypatch.setitem(TASKS, "text_to_sql", named)
    assert evaluated(run_dir, *words) == 2
    assert "execution_accuracy/unheard=0: was not scored" in capsys.readouterr().err
    report = json.loads(output.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert report["adapter"]["loss"] < report["base"]["loss"] and "ship" not in report
