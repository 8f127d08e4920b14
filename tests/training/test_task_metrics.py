"""Metrics of generated answers: at validations, in the files of a run, and as what chooses adapters and ends runs."""

import csv
import json

import pytest
from safetensors.torch import load_file
from tiny_runs import tiny_config

from lightning_peft.commands.train import train
from lightning_peft.config import TrainConfig
from lightning_peft.evaluation.scorers import names_of_metrics
from lightning_peft.objectives.registry import OBJECTIVES
from lightning_peft.sweeps.sweep import RESULT_NUMBERS
from lightning_peft.tasks.registry import TASKS
from lightning_peft.training.callbacks.task_metrics import TaskMetrics

RUN = ["trainer.max_steps=6", "data.packing=false", "validation.samples=0", "validation.every_n_steps=2"]
SCORED = [*RUN, "validation.metrics=[test_task_metrics:nth,execution_accuracy]", "validation.budget=null",
          "validation.max_new_tokens=4"]  # fmt: skip

given: list[list[str]] = []
"""Answers of every scoring."""
values = [1.0]
"""Values of the metric of one's own at each scoring, the last one from then on."""


def nth(rows, answers):
    assert all(row["completion"] and row["prompt"] for row in rows) and len(rows) == len(answers)
    given.append(answers)
    return values[min(len(given), len(values)) - 1]


@pytest.fixture(autouse=True)
def forget():
    given.clear()
    values[:] = [1.0]


def validations(run_dir, name):
    with (run_dir / "metrics.csv").open() as file:
        return [(int(row["step"]), float(row[name])) for row in csv.DictReader(file) if row.get(name)]


def run(run_dir, *words: str):
    return train(tiny_config(run_dir, *SCORED, *words))


def test_metrics_stand_in_metrics_csv_and_in_the_result(tmp_path):
    values[:] = [0.25, 0.5, 0.75]
    result = run(tmp_path / "r")
    assert result["metrics"] == {"nth": 0.75, "execution_accuracy": 0.0}
    assert json.loads((tmp_path / "r" / "result.json").read_text())["metrics"] == result["metrics"]
    assert dict(validations(tmp_path / "r", "nth")) == {2: 0.25, 4: 0.5, 6: 0.75}
    assert [len(answers) for answers in given] == [8, 8, 8]


def test_scoring_changes_no_weight(tmp_path):
    run(tmp_path / "scored")
    train(tiny_config(tmp_path / "plain", *RUN))
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("scored", "plain"))
    assert all(one[name].equal(other[name]) for name in one)


def test_4_bit_base_is_scored(tmp_path):
    assert run(tmp_path / "r", "method=qlora", "validation.metric_rows=2")["metrics"]["nth"] == 1.0
    assert {len(answers) for answers in given} == {2}


@pytest.mark.parametrize(("best_by", "step", "best"), [("nth", 4, 0.1), ("-nth", 2, 0.9)])
def test_adapter_best_is_the_best_by_the_metric(tmp_path, best_by, step, best):
    values[:] = [0.9, 0.1, 0.5]
    run(tmp_path / "r", f"checkpoint.best_by={best_by}")
    written = json.loads((tmp_path / "r" / "checkpoints" / "best.json").read_text())
    assert written == pytest.approx({"nth": best, "step": step})


def test_run_ends_after_validations_that_are_no_better(tmp_path):
    values[:] = [0.5, 0.5625, 0.515625, 0.9]
    words = ["trainer.max_steps=40", "early_stopping.metric=-nth", "early_stopping.patience=2"]
    result = run(tmp_path / "r", *words, "early_stopping.min_delta=0.1")
    assert (result["status"], result["steps"]) == ("finished", 6)
    assert result["stopped_early"] == "nth was no better than 0.5 at 2 validations in a row"
    assert run(tmp_path / "r", *words, "resume=auto")["steps"] == 6  # it is finished


def test_what_early_stopping_has_seen_goes_on_with_a_resumed_run(tmp_path):
    values[:] = [0.5, 0.4]
    words = ["early_stopping.metric=-nth", "early_stopping.patience=2", "checkpoint.every_n_steps=2"]
    run(tmp_path / "r", *words, "trainer.max_steps=4", "schedule=constant")
    result = run(tmp_path / "r", *words, "trainer.max_steps=40", "schedule=constant", "resume=auto")
    assert result["steps"] == 6 and "stopped_early" in result


def test_scoring_beyond_the_budget_is_skipped_and_said(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="lightning_peft")
    now = [0.0]
    answers = TaskMetrics.answers

    def thirty_seconds(self, *arguments):
        now[0] += 30
        return answers(self, *arguments)

    monkeypatch.setattr(TaskMetrics, "answers", thirty_seconds)
    began = TaskMetrics.on_train_start

    def own_clock(self, trainer, module):
        self.clock = lambda: now[0] + 10 * trainer.global_step
        began(self, trainer, module)

    monkeypatch.setattr(TaskMetrics, "on_train_start", own_clock)
    result = run(tmp_path / "r", "validation.budget=0.5", "trainer.max_steps=10")
    # After steps 2, 4 ... 20 seconds of training each: 30 of 50; 60 of 100 is too much; 60 of 120 is not.
    assert [step for step, _ in validations(tmp_path / "r", "nth")] == [2, 6, 10, 10]
    assert "step 4: validation.metrics are not scored: they took 30.0 of 70.0 s" in caplog.text
    assert result["metrics"]["nth"] == 1.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["validation.metrics=[rouge]"], "validation.metrics=rouge: no such metric; choose one of execution_accuracy"),
        (["validation.metrics=[a-b:c]"], "validation.metrics=a-b:c: must be module:function"),
        (
            ["validation.metrics=[mine:steps]"],
            "validation.metrics=mine:steps: steps is the name of another number of a",
        ),
        (["validation.metrics=[mine:rank]"], "validation.metrics=mine:rank: rank is the name of another number of a"),
        (["validation.metrics=[mine:validation_divergence]"], "validation_divergence is the name of another number"),
        (["validation.metrics=[exact_match,cmudict]"], "validation.metrics: exact_match is named twice"),
        (["checkpoint.best_by=-exact_match"], "checkpoint.best_by=-exact_match: no validation computes it"),
        (
            ["early_stopping.metric=-validation_loss", "validation.every_n_steps=2"],
            "a small validation_loss is good; write early_stopping",
        ),
        (
            [
                "validation.metrics=[execution_accuracy]",
                "early_stopping.metric=execution_accuracy",
                "validation.every_n_steps=2",
            ],  # fmt: skip
            "a large execution_accuracy is good; write early_stopping.metric=-execution_accuracy",
        ),
        (["early_stopping.metric=validation_loss"], "nothing is validated during training; give validation.every_n"),
        (["validation.budget=0"], "validation.budget=0"),
        (["early_stopping.patience=0"], "early_stopping.patience=0: must be at least 1"),
    ],
)
def test_wrong_options_are_named_when_the_config_is_read(tmp_path, words, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        tiny_config(tmp_path, *words)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("no_such_module:f", "cannot be imported: No module named 'no_such_module'"),
        ("test_task_metrics:no_such", "cannot be imported: .* has no attribute 'no_such'"),
        ("execution_accuracy", "needs the columns schema, seed, level, which the rows lack"),
    ],
)
def test_what_cannot_be_computed_is_refused_before_a_weight_is_read(tmp_path, metric, message):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n} + 1", "completion": str(n + 1)}) + "\n" for n in range(30)))
    config = tiny_config(tmp_path / "r", "data=jsonl", f"data.train_path={rows}", f"validation.metrics=[{metric}]")
    with pytest.raises(ValueError, match=message):
        train(config)
    assert not (tmp_path / "r" / "config.yaml").exists()


def test_rows_of_ones_own_are_scored_by_the_metric_of_another_task(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n} + 1", "completion": str(n + 1)}) + "\n" for n in range(30)))
    config = tiny_config(
        tmp_path / "r", "data=jsonl", f"data.train_path={rows}", "data.validation_fraction=0.2", "trainer.max_steps=1",
        "validation.metrics=[final_number,exact_match]", "validation.max_new_tokens=4", "data.packing=false",
    )  # fmt: skip
    assert isinstance(config, TrainConfig)
    assert train(config)["metrics"].keys() == {"final_number_accuracy", "exact_match"}


def test_plain_text_rows_cannot_be_scored(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"Story number {n}."}) + "\n" for n in range(30)))
    words = [f"data.train_path={rows}", "data.validation_fraction=0.2", "validation.metrics=[exact_match]"]
    with pytest.raises(ValueError, match="no validation row asks for an answer"):
        train(tiny_config(tmp_path / "r", "data=jsonl", *words))


def test_every_other_number_of_a_run_has_a_name_that_no_function_may_have(tmp_path):
    run(tmp_path / "r")
    columns = (tmp_path / "r" / "metrics.csv").read_text().partition("\n")[0].split(",")
    measured = [name for objective in OBJECTIVES.values() for name in objective.logs]
    names = {*columns, *json.loads((tmp_path / "r" / "result.json").read_text()), *measured, *RESULT_NUMBERS}
    free = {"nth", "execution_accuracy", *(name for name in names if not name.isidentifier())}
    for name in names - free:
        with pytest.raises(ValueError, match=f"{name} is the name of another number of a run; rename the function"):
            names_of_metrics([f"mine:{name}"], "none")


@pytest.mark.parametrize("task", TASKS)
def test_metrics_of_tasks_have_names_of_their_own(task):
    assert names_of_metrics([task] if TASKS[task].metric_names else [], task) == [*TASKS[task].metric_names]
