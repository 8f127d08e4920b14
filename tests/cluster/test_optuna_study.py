"""Optuna's draws: asked for by processes that come and go, told once."""

import pytest

from lightning_peft.sweeps.search import Dimension, OptunaStudy

pytest.importorskip("optuna", reason="pip install 'lightning-peft[optuna]'")

DIMENSIONS = [
    Dimension("adapter.rank", ["4", "8", "16"]),
    Dimension("optimizer.lr", [], 1e-5, 1e-2, is_log=True),
    Dimension("adapter.alpha", [], 1, 64, is_int=True),
]


@pytest.mark.filterwarnings("ignore")  # optuna says that its journal is experimental
def test_every_process_asks_the_same_study(tmp_path):
    drawn = []
    for _ in range(4):
        study = OptunaStudy(tmp_path, DIMENSIONS, seed=0)
        number, overrides = study.ask()
        study.tell({earlier: float(earlier) for earlier, _ in drawn} | ({0: None} if number == 3 else {}))
        drawn.append((number, overrides))
    assert [number for number, _ in drawn] == [0, 1, 2, 3]
    assert len({tuple(overrides) for _, overrides in drawn}) == 4
    for _, overrides in drawn:
        rank, rate, alpha = (word.partition("=")[2] for word in overrides)
        assert rank in ("4", "8", "16") and 1e-5 <= float(rate) <= 1e-2 and 1 <= int(alpha) <= 64
    told = OptunaStudy(tmp_path, DIMENSIONS, seed=0).study.trials
    # The value that comes second changes nothing.
    assert [trial.value for trial in told] == [0.0, 1.0, 2.0, None]


@pytest.mark.filterwarnings("ignore")
def test_stopped_trial_is_told_with_what_it_reached(tmp_path):
    study = OptunaStudy(tmp_path, DIMENSIONS, seed=0)
    for _ in range(2):
        study.ask()
    study.tell({0: 1.0, 1: None}, pruned={1: {4: 3.0, 12: 2.0}})
    study.tell({1: 0.5})  # it went on all the same
    one, other = OptunaStudy(tmp_path, DIMENSIONS, seed=0).study.trials
    assert (one.state.name, one.value) == ("COMPLETE", 1.0)
    assert (other.state.name, other.intermediate_values) == ("PRUNED", {4: 3.0, 12: 2.0})
