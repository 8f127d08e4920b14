"""A metric of one's own: the forms it may have, and the line where it fails."""

import pytest

from lightning_peft.evaluation.scorers import own_metric

METRICS = """
def length(rows, answers):
    return sum(map(len, answers)) / len(answers)

def words(rows, answers):
    return "many"

def fails(rows, answers):
    return 1 / 0

def one(answers):
    return 1.0
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "metrics_of_a_test.py").write_text(METRICS)
    monkeypatch.syspath_prepend(tmp_path)


def test_number_is_named_by_the_function():
    assert own_metric("metrics_of_a_test:length")([{}, {}], ["a", "abc"]) == {"length": 2.0}


def test_a_function_that_does_not_take_rows_and_answers_is_refused_before_it_is_called():
    with pytest.raises(ValueError, match=r"metrics_of_a_test:one: must take the rows and their answers: too many"):
        own_metric("metrics_of_a_test:one")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "fails",
            r"metrics_of_a_test:fails: failed on 1 rows with ZeroDivisionError: division by zero; LIGHTNING_PEFT_",
        ),
        ("words", r"metrics_of_a_test:words: must return one number, got 'many'"),
    ],
)
def test_what_it_does_wrong_is_one_line(name, message):
    score = own_metric(f"metrics_of_a_test:{name}", "validation.metrics")
    with pytest.raises(ValueError, match="validation.metrics=" + message) as caught:
        score([{}], ["a"])
    assert "\n" not in str(caught.value)
