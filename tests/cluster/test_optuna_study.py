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
        number, overrides = study.ask({})
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
        study.ask({})
    study.tell({0: 1.0, 1: None}, pruned={1: {4: 3.0, 12: 2.0}})
    study.tell({1: 0.5})  # it went on all the same
    one, other = OptunaStudy(tmp_path, DIMENSIONS, seed=0).study.trials
    assert (one.state.name, one.value) == ("COMPLETE", 1.0)
    assert (other.state.name, other.intermediate_values) == ("PRUNED", {4: 3.0, 12: 2.0})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "dimensions",
    [
        [Dimension("adapter.rank", ["2", "4"]), Dimension("seed", ["0", "1", "2"])],
        [Dimension("adapter.rank", [], 2, 4, is_int=True), Dimension("adapter.dropout", ["0.1", "0.2"])],
    ],
)
def test_every_combination_is_drawn_once_and_a_repeat_is_told_what_is_known(tmp_path, dimensions):
    """Rank 4 is far better, so that the sampler asks for it again and again."""
    drawn: dict[tuple[str, ...], float | None] = {}
    numbers: list[int] = []
    for _ in range(6):
        study = OptunaStudy(tmp_path, dimensions, seed=0)
        number, overrides = study.ask(drawn)
        assert tuple(overrides) not in drawn
        drawn[tuple(overrides)] = 1.0 if "adapter.rank=4" in overrides else 9.0
        study.tell({number: drawn[tuple(overrides)]})
        numbers.append(number)
    repeats = [trial for trial in study.study.trials if trial.number not in numbers]
    assert repeats, "the case that this test is about"
    for trial in repeats:
        asked = tuple(
            f"{d.key}={d.text(v) if d.is_int else v}" for d, v in zip(dimensions, trial.params.values(), strict=True)
        )
        assert trial.value == drawn[asked]
    with pytest.raises(ValueError, match="all 6 combinations of the swept values are drawn"):
        OptunaStudy(tmp_path, dimensions, seed=0).ask(drawn)


@pytest.mark.filterwarnings("ignore")
def test_repeat_of_a_trial_without_a_score_is_no_trial(tmp_path):
    dimensions = [Dimension("adapter.rank", ["2", "4"])]
    study = OptunaStudy(tmp_path, dimensions, seed=0)
    drawn = {(f"adapter.rank={rank}",): None for rank in (2,)}
    assert study.ask(drawn)[1] == ["adapter.rank=4"]
    assert {trial.state.name for trial in study.study.trials[:-1]} <= {"FAIL"}
    assert study.study.trials[-1].params == {"adapter.rank": "4"}


@pytest.mark.filterwarnings("ignore")
def test_moved_folder_goes_on_with_its_study(tmp_path):
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    study = OptunaStudy(before, DIMENSIONS, seed=0)
    number, _ = study.ask({})
    study.tell({number: 1.5})
    before.rename(after)
    study = OptunaStudy(after, DIMENSIONS, seed=0)
    assert [trial.value for trial in study.study.trials] == [1.5]
    assert study.ask({})[0] == 1
