"""Trials that are drawn: from which values, how many there are, and no training twice."""

import json
import random

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from lightning_peft.__main__ import main
from lightning_peft.commands import plan_sweep
from lightning_peft.sweeps.search import Dimension, dimension, random_trials
from lightning_peft.sweeps.sweep import read_sweep


def of(word: str) -> Dimension:
    return dimension(OverridesParser.create().parse_override(word))


def test_swept_words_become_dimensions():
    assert of("adapter.rank=4,8").choices == ["4", "8"]
    assert of("adapter.rank=range(4,17,4)").choices == ["4", "8", "12", "16"]
    assert of("adapter.dropout=shuffle(choice(0.1,0.2))").key == "adapter.dropout"
    assert of("optimizer.lr=tag(log,interval(1e-5,1e-2))") == Dimension("optimizer.lr", [], 1e-5, 1e-2, is_log=True)
    assert of("adapter.rank=int(interval(2,64))") == Dimension("adapter.rank", [], 2, 64, is_int=True)


@pytest.mark.parametrize("word", ["optimizer.lr=interval(2,1)", "optimizer.lr=tag(log,interval(0,1))"])
def test_interval_that_cannot_be_drawn_from_is_named(word):
    with pytest.raises(ValueError, match="an interval goes from a smaller to a larger number, above 0 if log"):
        of(word)


def test_random_trials_differ_stay_inside_and_repeat_with_the_seed():
    dimensions = [of("optimizer.lr=tag(log,interval(1e-5,1e-2))"), of("adapter.rank=4,8")]
    drawn = random_trials(dimensions, 50, seed=3)
    assert drawn == random_trials(dimensions, 50, seed=3) != random_trials(dimensions, 50, seed=4)
    rates = [float(words[0].partition("=")[2]) for words in drawn]
    assert all(1e-5 <= rate <= 1e-2 for rate in rates) and len({tuple(words) for words in drawn}) == 50
    # A third of the draws falls into each decade of a log interval over three.
    assert 8 <= sum(rate < 1e-4 for rate in rates) <= 27
    assert len(random_trials([of("adapter.rank=4,8,16")], 10, seed=0)) == 3


@pytest.mark.parametrize(
    ("words", "all_of_them"),
    [
        (["adapter.rank=int(interval(2,4))"], {("2",), ("3",), ("4",)}),
        (["adapter.rank=tag(log,int(interval(1,3)))"], {("1",), ("2",), ("3",)}),
        (["adapter.rank=4,4"], {("4",)}),
        (["adapter.rank=int(interval(2,3))", "seed=0,1"], {("2", "0"), ("2", "1"), ("3", "0"), ("3", "1")}),
        # No float lies between the two.
        (["optimizer.lr=interval(1.0,1.0000000000000002)"], {("1",), ("1.0000000000000002",)}),
    ],
)
def test_random_trials_end_where_no_value_is_left(words, all_of_them):
    drawn = random_trials([of(word) for word in words], 8, seed=0)
    assert {tuple(word.partition("=")[2] for word in trial) for trial in drawn} == all_of_them
    assert len(drawn) == len(all_of_them)


def test_narrow_interval_is_drawn_from_with_more_digits_and_inside():
    drawn = [float(word.partition("=")[2]) for (word,) in random_trials([of("a=interval(1.0000001,1.0000002)")], 50, 0)]
    assert len(set(drawn)) == 50 and all(1.0000001 <= value <= 1.0000002 for value in drawn)


def test_whole_numbers_of_a_log_interval_are_drawn_by_their_logarithm():
    """Of the numbers from 1 to 1000 three tenths are below 10 by the logarithm, a hundredth by the number: P(round(x) <
    10) = ln(9.5 / 0.5) / ln(1000.5 / 0.5) = 0.387."""
    one = of("adapter.rank=tag(log,int(interval(1,1000)))")
    generator = random.Random(0)
    small = sum(int(one.draw(generator)) < 10 for _ in range(2000)) / 2000
    assert small == pytest.approx(0.387, abs=0.05)


@pytest.mark.parametrize("search", ["random", "optuna"])
def test_fewer_trials_than_asked_for_are_said(search, capsys):
    if search == "optuna":
        pytest.importorskip("optuna", reason="pip install 'lightning-peft[optuna]'")
    words = ["adapter.rank=int(interval(2,4))", f"sweep.search={search}", "sweep.trials=8", "model=tiny"]
    assert main(["estimate", "-m", *words, "trainer.max_steps=2", "sweep.cluster=local"]) == 0
    assert "sweep.trials=8: the swept values have 3 combinations, and each is trained once" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optimizer.lr=1e-3,0.001", "is the same training as"),
        ("adapter.rank=4,8,0", "adapter.rank=0: a rank is at least 1"),
        ("optimizer.lr=interval(0,1)", "optimizer.lr=0.0: must be above 0"),
    ],
)
def test_each_value_that_optuna_may_draw_is_checked_before_it_does(word, message, tmp_path, capsys):
    pytest.importorskip("optuna", reason="pip install 'lightning-peft[optuna]'")
    words = [word, "sweep.search=optuna", "sweep.trials=2", "model=tiny", "trainer.max_steps=2", "cluster=local"]
    assert main(["submit", "-m", *words, f"sweep_dir={tmp_path}/s"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


@pytest.mark.filterwarnings("ignore")  # optuna says that its journal is experimental
def test_sweep_of_optuna_draws_each_trial_once_also_after_it_was_moved(tmp_path, monkeypatch, capsys):
    pytest.importorskip("optuna", reason="pip install 'lightning-peft[optuna]'")
    monkeypatch.setattr(plan_sweep, "start", lambda *of: None)
    folder = tmp_path / "s"
    words = ["model=tiny", "trainer.max_steps=2", "adapter.rank=2,4,8", "sweep.search=optuna", "sweep.trials=5"]
    assert main(["submit", "-m", *words, "cluster=local", f"sweep_dir={folder}"]) == 0
    for _ in range(3):
        assert main(["sweep", "ask", str(folder)]) == 0
        run_dir = folder / read_sweep(folder).trials[-1].name
        loss = 1.0 if "rank4" in run_dir.name else 9.0
        (run_dir / "result.json").write_text(json.dumps({"status": "finished", "validation_loss": loss, "steps": 2}))
        folder = folder.rename(tmp_path / f"{folder.name}-moved")
    assert sorted(trial.name for trial in read_sweep(folder).trials) == ["rank2", "rank4", "rank8"]
    assert main(["sweep", "ask", str(folder)]) == 2
    assert "all 3 trials are drawn" in capsys.readouterr().err
