import pytest

from lightning_peft.tasks.registry import TASKS
from lightning_peft.tasks.text_to_sql.rows import generate_rows


@pytest.fixture(scope="module")
def rows():
    return generate_rows(200, 0, "test")


def test_gold_answers_score_one_at_every_level(rows):
    answers = [f"```sql\n{row['completion']};\n```" for row in rows]
    scores = TASKS["text_to_sql"].score(rows, answers)
    levels = ("easy", "medium", "hard")
    assert scores == {"execution_accuracy": 1.0} | {f"execution_accuracy/{level}": 1.0 for level in levels}


@pytest.mark.parametrize("answer", ["SELECT 1", "SELECT count(*) FROM sqlite_master", "", "I cannot answer that."])
def test_useless_answers_score_zero(rows, answer):
    assert TASKS["text_to_sql"].score(rows, [answer] * len(rows))["execution_accuracy"] == 0.0


def test_accuracy_per_level_is_the_share_within_the_level(rows):
    answers = [row["completion"] if row["level"] == "hard" else "SELECT 1" for row in rows]
    scores = TASKS["text_to_sql"].score(rows, answers)
    hard = sum(row["level"] == "hard" for row in rows)
    assert scores["execution_accuracy/hard"] == 1.0 and scores["execution_accuracy/easy"] == 0.0
    assert scores["execution_accuracy"] == pytest.approx(hard / len(rows))


def test_shots_are_of_different_levels(rows):
    shots = TASKS["text_to_sql"].few_shot(rows)
    assert {shot["level"] for shot in shots} == {"easy", "medium", "hard"} and len(shots) == 3
    assert (
        TASKS["text_to_sql"].few_shot([row for row in rows if row["level"] == "easy"])
        == [row for row in rows if row["level"] == "easy"][:3]
    )


def test_answers_and_rows_must_be_as_many(rows):
    with pytest.raises(ValueError, match="zip"):
        TASKS["text_to_sql"].score(rows, ["SELECT 1"])


def test_cmudict_scores_the_first_line():
    rows = [{"prompt": "c a t", "completion": "K AE1 T"}, {"prompt": "d o g", "completion": "D AO1 G"}]
    scores = TASKS["cmudict"].score(rows, ["K AE1 T\nand so on", ""])
    assert scores == {"exact_match": 0.5, "phoneme_error_rate": 0.5}


def test_final_number_accuracy():
    rows = [{"completion": "#### 4"}, {"completion": "#### 5"}]
    assert TASKS["final_number"].score(rows, ["2 + 2 = 4", "#### 4"]) == {"final_number_accuracy": 0.5}


def test_samples_stand_side_by_side_with_marks(rows):
    answers = {"base": ["no"] * len(rows), "adapter": [f"{row['completion']};" for row in rows]}
    samples = TASKS["text_to_sql"].samples(rows, answers, 4)
    assert [sample.prompt for sample in samples] == [rows[i]["prompt"] for i in (0, 50, 100, 150)]
    assert all(sample.answers["base"] == ("", False) for sample in samples)
    assert all(sample.answers["adapter"] == (sample.expected, True) for sample in samples)


def test_headline_is_among_the_metrics(rows):
    for name, task in TASKS.items():
        assert task.name == name
        scores = task.score(rows[:3], [row["completion"] for row in rows[:3]])
        assert scores == {} if task.headline is None else task.headline in scores
