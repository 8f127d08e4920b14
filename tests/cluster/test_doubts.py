"""A doubt about a sweep's table is said, each by its finder, and nothing is said of a sound sweep."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lightning_peft.__main__ import main
from lightning_peft.compose import compose_config
from lightning_peft.config import plain, train_config
from lightning_peft.evaluation.scorers import check_direction
from lightning_peft.sweeps.doubts import COVERAGE, OTHER_ROWS, doubts
from lightning_peft.sweeps.foreground import enter_trial
from lightning_peft.sweeps.statistics import sentence
from lightning_peft.sweeps.sweep import Sweep, Trial, read_sweep, write_sweep
from lightning_peft.sweeps.table import table_rows


def trial(words: list[str], loss: float | None, state: str = "finished", **more: Any) -> Trial:
    result = {"status": state, "steps": 100, "validation_loss": loss, "metrics": {}} | more
    name = "_".join(word.partition("=")[0].rpartition(".")[2] + word.partition("=")[2] for word in words)
    return Trial(name, words, state, 1, is_waiting=False, result=result if state != "failed" else None)


def a_sweep(*trials: Trial, metric: str = "validation_loss") -> Sweep:
    keys = [word.partition("=")[0] for word in trials[0].overrides]
    swept = [f"{key}={','.join(dict.fromkeys(t.values[key] for t in trials))}" for key in keys]
    return Sweep(["model=tiny"], swept, "local", metric, count=len(trials), trials=list(trials))


def over_seeds(*losses: float | None, rank: int = 4, **more: Any) -> list[Trial]:
    words = [f"adapter.rank={rank}"]
    return [
        trial([*words, f"seed={n}"], loss, "diverged" if loss is None else "finished", **more)
        for n, loss in enumerate(losses)
    ]


def test_sound_sweep_has_none():
    assert doubts(a_sweep(trial(["adapter.rank=4"], 1.5), trial(["adapter.rank=8"], 1.4))) == []
    assert doubts(a_sweep(Trial("rank4", ["adapter.rank=4"]))) == []
    six = over_seeds(1.0, 1.1, 1.2, 1.3, 1.4, 1.5)
    assert doubts(a_sweep(*six)) == []


def with_words(words: list[str]) -> Trial:
    again = trial(["adapter.rank=8"], 1.4)
    again.other_words = words
    return again


def of_rows(rank: int, fingerprint: str) -> Trial:
    return trial([f"adapter.rank={rank}"], 2.0 - rank / 10, content={"training rows": fingerprint, "base weights": "w"})


ONE = trial(["adapter.rank=4"], 1.5)


@pytest.mark.parametrize(
    ("sweep", "line"),
    [
        (a_sweep(ONE, trial(["adapter.rank=8"], 1.5), trial(["adapter.rank=2"], 2.0)), "equally good: rank4, rank8"),
        (
            a_sweep(*over_seeds(1.0, None, None), *over_seeds(1.4, 1.5, 1.6, rank=8)),
            "adapter.rank=4: its mean is of 1 of 3 seeds; 2 diverged",
        ),
        (
            a_sweep(ONE, trial(["adapter.rank=8"], 1.4, steps=40, stopped_early="no better")),
            "stopped early, at step 40: rank8",
        ),
        (
            a_sweep(ONE, trial(["adapter.rank=2"], 1.6), trial(["adapter.rank=8"], 1.4, steps=1000)),
            "trained for another number of steps than the others' 100: rank8",
        ),
        (a_sweep(ONE, with_words(["optimizer.lr=1e-5"])), "trained with other words (optimizer.lr=1e-5): rank8"),
        (
            a_sweep(ONE, trial(["adapter.rank=8"], 1.4, rollbacks=2, lr_factor=0.25)),
            "diverged, and went on at 0.25 times the learning rate: rank8",
        ),
        (
            a_sweep(ONE, trial(["adapter.rank=8"], 1.4, steps_left_out=3)),
            "left steps out that were not finite: rank8",
        ),
        (
            a_sweep(trial(["data=alpaca"], 1.5), trial(["data=gsm8k"], 1.4)),
            "validation_loss of trials that differ in data may be of other rows, or of other tokens",
        ),
        (
            a_sweep(trial(["model=tiny"], 1.5), trial(["model=llama_3_1_8b"], 1.4)),
            "validation_loss of trials that differ in model may be of other rows, or of other tokens",
        ),
        (
            a_sweep(*(trial([f"seed={n}"], 1.5, train_loss=1.0 + n) for n in range(2)), metric="train_loss"),
            "train_loss is of the rows of the last step alone: differences may be of these rows",
        ),
        (
            a_sweep(*over_seeds(1.0, 1.1)),
            "intervals over 2 seeds are too narrow: they hold the true mean in half of all cases, not in 95 %",
        ),
        (
            a_sweep(of_rows(4, "a"), of_rows(2, "a"), of_rows(8, "b")),
            "training rows are not those of the other trials, as if edited between two starts: rank8",
        ),
        (
            a_sweep(trial(["seed=0"], math.nan), trial(["seed=1"], None)),
            "no trial has a finite validation_loss, 2 of 2 have finished",
        ),
    ],
)  # fmt: skip
def test_what_could_mislead_is_said(sweep, line):
    assert line in doubts(sweep)


@pytest.mark.parametrize(
    "sweep",
    [
        a_sweep(trial(["trainer.max_steps=100"], 1.5), trial(["trainer.max_steps=200"], 1.4, steps=200)),
        a_sweep(with_words(["trainer.devices=2"])),
        a_sweep(of_rows(2, "a"), of_rows(8, "a"), ONE),
        a_sweep(*(trial([f"recipe=lora/{n}"], 2.0 - n, content={"training rows": str(n)}) for n in range(2))),
        a_sweep(trial(["data.micro_batch_size=1"], 1.5), trial(["data.micro_batch_size=2"], 1.4, steps=50)),
    ],
)
def test_what_is_meant_is_not_said(sweep):
    assert doubts(sweep) == []


def test_coverage_is_what_normal_scores_show():
    """Intervals of resampled means of n normal scores, the way the table makes them, against the true mean 0."""
    import numpy as np

    from lightning_peft.sweeps.statistics import bounds, resampled_means

    generator, found = np.random.default_rng(0), {}
    for count in (2, 3, 4):
        intervals = [bounds(resampled_means(generator.normal(size=count).tolist())) for _ in range(400)]
        found[count] = sum(low <= 0 <= high for low, high in intervals) / 400
    assert found == {
        2: pytest.approx(1 / 2, abs=0.07),
        3: pytest.approx(2 / 3, abs=0.07),
        4: pytest.approx(0.8, abs=0.07),
    }
    assert set(COVERAGE) == {2, 3, 4, 5}


def test_equal_means_make_no_winner():
    one, other = trial(["adapter.rank=8"], 1.5), trial(["adapter.rank=4"], 1.5)
    assert sentence(a_sweep(one, other)).startswith("rank 4 is as good as rank 8: validation_loss 1.5; one seed each")
    one, other = trial(["optimizer.lr=1e-3"], 1.5), trial(["optimizer.lr=1e-2"], 1.5)
    both = "optimizer.lr=1e-3 and optimizer.lr=1e-2 are equally good: validation_loss 1.5"
    assert sentence(a_sweep(one, other)).startswith(both)


def test_trial_that_has_not_finished_is_ranked_behind_those_that_have():
    paused, diverged = (trial([f"adapter.rank={n}"], 0.5, state) for n, state in ((1, "paused"), (2, "diverged")))
    rows = table_rows(a_sweep(paused, ONE, diverged, trial(["adapter.rank=8"], 1.4)), "validation_loss")
    assert [row["trial"] for row in rows] == ["rank8", "rank4", "rank1", "rank2"]
    rows = table_rows(a_sweep(paused, ONE, diverged), "-rank")
    assert [row["rank"] for row in rows] == [4, 2, 1]


def test_time_of_a_trial_is_that_of_all_its_starts():
    """The trial on two devices was paused at a rung after 30 s, and took 90 s more."""
    resumed = trial(["adapter.rank=4"], 1.5, seconds=90.0, device_hours=0.05)
    resumed.spent_hours = 2 * 30 / 3600
    (row,) = table_rows(a_sweep(resumed), "validation_loss")
    assert row["seconds"] == pytest.approx(120.0)


def test_start_with_other_words_in_the_same_folder_is_told_from_the_first(tmp_path):
    words = ["model=tiny", "++trainer.max_steps=3", "data.max_rows=8"]
    for rank, more in ((4, words), (8, [words[0], "++trainer.max_steps=9", "resume=auto"])):
        enter_trial(tmp_path / f"rank{rank}", [*more, f"adapter.rank={rank}", "run_dir=x"], [f"adapter.rank={rank}"])
    first, second = read_sweep(tmp_path).trials
    assert first.other_words == []
    assert second.other_words == ["trainer.max_steps=9", "without data.max_rows=8"]


def test_only_words_that_trained_a_trial_count(tmp_path):
    """A finished one that is asked again keeps those of the start that trained it; not every word changes a number."""
    words = ["model=tiny", "adapter.rank=4", "run_dir=x"]
    enter_trial(tmp_path / "rank4", words, ["adapter.rank=4"])
    (tmp_path / "rank4").mkdir()
    (tmp_path / "rank4" / "result.json").write_text(json.dumps({"status": "finished", "seconds": 1.0}))
    enter_trial(tmp_path / "rank4", [*words, "optimizer.lr=1"], ["adapter.rank=4"])
    assert read_sweep(tmp_path).trials[0].other_words == []
    free = ["cluster.time=2-0", "trainer.max_time=1h", "logger=none", "data.num_workers=2"]
    assert doubts(a_sweep(ONE, with_words(free))) == []


def test_hours_of_a_start_that_failed_are_counted_once(tmp_path):
    """Starts that end before they train leave its result where it is."""
    (tmp_path / "rank4").mkdir()
    result = {"status": "failed", "seconds": 3600.0, "device_hours": 1.0}
    (tmp_path / "rank4" / "result.json").write_text(json.dumps(result))
    for _ in range(3):
        enter_trial(tmp_path / "rank4", ["model=tiny", "adapter.rank=4"], ["adapter.rank=4"])
    assert read_sweep(tmp_path).trials[0].spent_hours == 1.0


def test_keys_of_other_rows_are_options():
    config = plain(compose_config("train", ["model=tiny"]))
    for key in OTHER_ROWS:
        found = config
        for part in key.split("."):
            assert part in found, key
            found = found[part]


def test_run_whose_metric_has_the_wrong_sign_is_still_read():
    """Such runs were trained before the sign was looked at."""
    words = ["objective=dpo", "validation.every_n_steps=5"]
    saved = plain(compose_config("train", ["model=tiny", *words]))
    saved["early_stopping"]["metric"] = "validation_rewards/margin"
    assert train_config(saved).early_stopping.metric == "validation_rewards/margin"
    with pytest.raises(ValueError, match="early_stopping.metric=-validation_rewards/margin"):
        compose_config("train", ["model=tiny", *words, "early_stopping.metric=validation_rewards/margin"])


@pytest.mark.parametrize(
    ("metric", "right"),
    [
        ("tokens_per_second", "-tokens_per_second"), ("-train_loss", "train_loss"),
        ("-peak_memory_gib", "peak_memory_gib"), ("validation_rewards/accuracy", "-validation_rewards/accuracy"),
    ],
)  # fmt: skip
def test_metric_whose_sign_ranks_the_worst_first_is_refused(metric, right):
    with pytest.raises(ValueError, match=f"sweep.metric={metric}: .* write sweep.metric={right}"):
        check_direction("sweep.metric", metric)
    check_direction("sweep.metric", right)


def test_table_and_report_say_it(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    sweep = a_sweep(ONE, trial(["adapter.rank=8"], 1.4, steps=1000), trial(["adapter.rank=2"], 1.6))
    for each in sweep.trials:
        (tmp_path / each.name).mkdir()
        (tmp_path / each.name / "result.json").write_text(json.dumps(each.result))
    write_sweep(sweep, tmp_path)
    assert main(["sweep", "table", str(tmp_path)]) == 0
    line = "trained for another number of steps than the others' 100: rank8"
    assert line in capsys.readouterr().out.splitlines()
    pytest.importorskip("matplotlib")
    assert main(["report", str(tmp_path)]) == 0
    assert line.replace("'", "&#x27;") in (tmp_path / "report.html").read_text()
    assert read_sweep(tmp_path).trials[0].other_words == []


@pytest.mark.slow
def test_rows_that_are_edited_between_two_trials_are_said(tmp_path: Path, capsys):
    rows, folder = tmp_path / "rows.jsonl", tmp_path / "sweep"
    words = ["model=tiny", "data=jsonl", f"data.train_path={rows}", "trainer.max_steps=2", "validation.samples=0"]

    def trained(answer: str, ranks: str) -> int:
        lines = [json.dumps({"prompt": f"{n} + 1 =", "completion": f"{answer} {n + 1}"}) for n in range(30)]
        rows.write_text("\n".join(lines))
        more = ["data.validation_fraction=0.2", "logger=none", f"adapter.rank={ranks}", "resume=auto"]
        return main(["train", "-m", *words, *more, f"run_dir={folder}"])

    assert trained("it is", "2,4") == 0
    assert trained("that makes", "4,8") != 0, "rank 4 has other rows now"
    capsys.readouterr()
    assert main(["sweep", "table", str(folder)]) == 0
    said = capsys.readouterr().out
    for what in ("training rows", "validation rows"):
        assert f"{what} are not those of the other trials, as if edited between two starts: rank8" in said
