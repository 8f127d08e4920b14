"""Rungs: the trials that go on, each of which is the run it would have been without the pause."""

import csv
import json
import time

import pytest
from safetensors.torch import load_file

from lightning_peft.__main__ import main
from lightning_peft.cluster.process import this_process
from lightning_peft.commands.train import train
from lightning_peft.compose import compose_config
from lightning_peft.sweeps.local_worker import claim
from lightning_peft.sweeps.pruning import brackets, may_go_on, promoted, rung_steps, rungs_in_words, target
from lightning_peft.sweeps.sweep import ENDED, Sweep, Trial, changed_sweep, note_rung, read_sweep, refresh, write_sweep

TINY = [
    "model=tiny", "data.max_rows=24", "data.max_validation_rows=4", "data.micro_batch_size=1", "data.packing=false",
    "trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.max_steps=9", "validation.samples=0",
]  # fmt: skip


def sweep_of(values: list[list[float | None]], pruning: str = "asha", reduction: int = 3, **states: str) -> Sweep:
    trials = [
        Trial(f"t{n}", [f"seed={n}"], "paused", 1, is_waiting=False, rung_values=list(reached))
        for n, reached in enumerate(values)
    ]
    for name, state in states.items():
        next(trial for trial in trials if trial.name == name).state = state
    return Sweep(
        [], ["seed=range(9)"], "local", "validation_loss", pruning=pruning, reduction=reduction, rungs=[3, 9],
        count=len(trials), trials=trials,
    )  # fmt: skip


def going_on(sweep: Sweep) -> list[str]:
    return [t.name for t in sweep.trials if t.state == "paused" and t.rung_values and may_go_on(sweep, t)]


@pytest.mark.parametrize(
    ("steps", "reduction", "least", "rungs"),
    [(81, 3, None, [9, 27]), (100, 4, 5, [5, 20, 80]), (9, 3, 1, [1, 3]), (2, 3, None, [1]), (64, 2, 8, [8, 16, 32])],
)
def test_rungs_grow_by_the_reduction_to_below_the_end(steps, reduction, least, rungs):
    assert rung_steps(steps, reduction, least) == rungs


def test_best_in_three_goes_on_from_a_rung():
    assert going_on(sweep_of([[5.0], [3.0]])) == []
    assert going_on(sweep_of([[5.0], [3.0], [4.0]])) == ["t1"]
    assert going_on(sweep_of([[5.0], [3.0, 2.0], [4.0], [2.5], [6.0], [7.0]])) == ["t3"]  # t1 has gone on before


def test_equal_values_let_on_no_more_than_the_share():
    assert going_on(sweep_of([[1.0]] * 6)) == ["t0", "t1"]


def test_value_that_is_not_finite_never_goes_on_and_takes_no_place():
    assert going_on(sweep_of([[None], [3.0], [4.0]])) == []
    assert going_on(sweep_of([[None], [3.0], [4.0], [5.0]])) == ["t1"]


def test_furthest_goes_on_first():
    sweep = sweep_of(
        [[1.0, 0.5], [2.0, 0.7], [3.0, 0.9], [4.0], [4.5], [4.6], [5.0], [6.0], [7.0], [8.0], [8.5], [9.0]]
    )
    assert promoted(sweep).name == "t0"


def test_sweep_too_small_for_its_reduction_has_a_winner_once_nothing_runs():
    assert promoted(sweep_of([[5.0], [3.0]], t0="running")) is None
    assert promoted(sweep_of([[5.0], [3.0]])).name == "t1"
    assert promoted(sweep_of([[5.0], [3.0]], t0="failed")).name == "t1"
    assert promoted(sweep_of([[5.0, 4.0], [3.0]])).name == "t0"
    assert promoted(sweep_of([[5.0], [3.0, 2.0]], t1="finished")) is None


def test_preempted_trial_is_taken_up_again_by_a_worker_while_it_gets_further(tmp_path):
    sweep = sweep_of([[5.0], [3.0], []], t2="preempted")
    write_sweep(sweep, tmp_path)

    def preempted_at(step: int) -> None:
        (tmp_path / "t2").mkdir(exist_ok=True)
        if not (tmp_path / "t2" / "config.yaml").exists():
            (tmp_path / "t2" / "config.yaml").write_text("pause_at: null\n")
        (tmp_path / "t2" / "result.json").write_text(json.dumps({"status": "preempted", "steps": step}))

    for step, expected in ((1, "t2"), (2, "t2"), (2, "t1")):  # once it gets no further, the best of the others ends
        preempted_at(step)
        with changed_sweep(tmp_path) as changed:
            changed.trial("t2").process = None
            changed.workers = [this_process()]
            for paused in changed.trials[:2]:  # they are as they were left, without a folder of their own here
                paused.process = None
                (tmp_path / paused.name).mkdir(exist_ok=True)
                (tmp_path / paused.name / "config.yaml").write_text("pause_at: 3\n")
                (tmp_path / paused.name / "result.json").write_text(json.dumps({"status": "paused", "steps": 3}))
        taken = claim(tmp_path)
        assert [trial.name for trial in taken] == [expected]
        assert read_sweep(tmp_path).trial("t2").attempts == min(step + 1, 3)
        assert "pause_at: 3" in (tmp_path / "t2" / "config.yaml").read_text()
    assert read_sweep(tmp_path).trial("t2").resumed_at == 2


def test_median_rule_lets_on_what_is_no_worse():
    assert going_on(sweep_of([[5.0], [3.0], [9.0]], "median")) == ["t0", "t1", "t2"]  # too few to tell
    assert going_on(sweep_of([[5.0], [3.0], [9.0], [4.0], [8.0]], "median")) == ["t0", "t1", "t3"]


def test_rung_keeps_the_metric_by_its_sign_and_only_at_its_step():
    sweep = sweep_of([[]])
    sweep.metric = "-accuracy"
    trial = sweep.trials[0]
    trial.result = {"status": "paused", "steps": 2, "metrics": {"accuracy": 0.5}}  # trainer.max_time paused it
    note_rung(sweep, trial)
    assert trial.rung_values == []
    trial.result["steps"] = 3
    note_rung(sweep, trial)
    note_rung(sweep, trial)
    assert trial.rung_values == [-0.5]
    assert rungs_in_words(sweep) == "rungs (asha): 1 reached step 3, 0 reached step 9, 0 reached the end"


def test_brackets_take_about_as_many_steps_each():
    found = brackets(17, 2, 3, seed=0)
    assert [found.count(b) for b in range(3)] == [9, 5, 3]  # the paper has 3^2 / 3, 3 / 2 and 1 of 5.5
    assert brackets(17, 2, 3, seed=0) == found != brackets(17, 2, 3, seed=1)
    for count in range(1, 40):
        assert len(brackets(count, 3, 4, 0)) == count and max(brackets(count, 3, 4, 0)) <= 3
    steps = [size * sum(81 / 3**h * 3**-b for h, b in zip(range(s, -1, -1), range(s + 1), strict=True))
             for size, s in zip((9, 4.5, 3), (2, 1, 0), strict=True)]  # fmt: skip
    assert steps == [243, 243, 243]  # one in three goes on to three times as many


def of_brackets(values: dict[str, tuple[int, list[float]]]) -> Sweep:
    sweep = sweep_of([reached for _, reached in values.values()], "hyperband")
    for trial, (name, (bracket, _)) in zip(sweep.trials, values.items(), strict=True):
        trial.name, trial.bracket = name, bracket
    return sweep


def test_trial_of_hyperband_is_compared_with_those_of_its_bracket():
    sweep = of_brackets({"a": (0, [5.0]), "b": (0, [3.0]), "c": (0, [4.0]), "d": (1, [1.0]), "e": (1, [2.0])})
    assert going_on(sweep) == ["b"] == [promoted(sweep).name]
    sweep.trials[1].state, sweep.trials[4].state = "finished", "running"
    assert promoted(sweep) is None
    sweep.trials[4].state = "paused"
    assert promoted(sweep).name == "d"  # too few to be halved, and a bracket of its own has a winner all the same
    sweep.trials[3].state = "finished"
    assert promoted(sweep) is None
    assert rungs_in_words(sweep) == (
        "rungs (hyperband): 3 reached step 3, 2 reached step 9, 2 reached the end; first looked at: 3 at step 3, "
        "2 at step 9, 0 at the end"
    )


def test_trial_of_a_later_bracket_pauses_at_its_first_rung():
    sweep = of_brackets({"a": (0, []), "b": (1, []), "c": (2, [])})
    assert [target(sweep, trial) for trial in sweep.trials] == [3, 9, None]
    trial = sweep.trials[1]
    trial.result = {"status": "paused", "steps": 9, "validation_loss": 2.5}
    note_rung(sweep, trial)
    assert trial.rung_values == [2.5] and target(sweep, trial) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sweep.pruning=halving"], "sweep.pruning=halving"),
        (["sweep.reduction=1"], "sweep.reduction=1: must be at least 2"),
        (
            ["sweep.pruning=asha", "sweep.min_steps=9"],
            "sweep.min_steps=9 trainer.max_steps=9: the first rung is before",
        ),
        (["sweep.pruning=asha", "sweep.metric=seconds"], "sweep.metric=seconds: is not taken at a rung; choose one of"),
        (["sweep.pruning=asha", "trainer.max_steps=9,12"], "trainer.max_steps=9,12: rungs are steps of a run"),
        (["sweep.pruning=asha", "trainer.max_steps=-1"], "rungs are steps of a run, so give trainer.max_steps"),
        (["sweep.pruning=asha", "cluster=kubernetes"], "sweep.pruning=asha cluster=kubernetes: trials are paused and"),
    ],
)
def test_wrong_words_start_nothing(tmp_path, capsys, words, message):
    given = {word.partition("=")[0] for word in words}
    tiny = [word for word in TINY if word.partition("=")[0] not in given]
    assert main(["submit", "-m", "cluster=local", *tiny, f"sweep_dir={tmp_path}/s", "adapter.rank=2,4", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_run_that_pauses_twice_is_the_run_that_never_does(tmp_path):
    def config(name, *words):
        return compose_config("train", [*TINY, "validation.at_steps=[1,3]", f"run_dir={tmp_path}/{name}", *words])

    train(config("whole"))
    for step in (1, 3):
        with pytest.raises(SystemExit) as left:
            train(config("paused", f"pause_at={step}", "resume=auto"))
        assert left.value.code == 75
        result = json.loads((tmp_path / "paused" / "result.json").read_text())
        assert (result["status"], result["steps"]) == ("paused", step) and result["validation_loss"] > 0
        # Killed behind the checkpoint, before it could say so: the next start takes no step beyond the rung.
        (tmp_path / "paused" / "result.json").unlink()
        with pytest.raises(SystemExit):
            train(config("paused", f"pause_at={step}", "resume=auto"))
        again = json.loads((tmp_path / "paused" / "result.json").read_text())
        assert all(again[key] == result[key] for key in ("status", "steps", "validation_loss", "train_loss", "metrics"))
    result = train(config("paused", "resume=auto"))
    assert result["steps"] == 9 and result["device_hours"] == pytest.approx(result["seconds"] / 3600)
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "paused"))
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)

    def rows(name):
        with (tmp_path / name / "metrics.csv").open() as file:
            kept = ("step", "loss", "lr", "grad_norm", "validation_loss")
            return [[row[key] for key in kept] for row in csv.DictReader(file)]

    assert rows("paused") == rows("whole")


def wait_for(folder, seconds: float = 900) -> Sweep:
    deadline = time.monotonic() + seconds
    while True:
        with changed_sweep(folder) as sweep:
            refresh(sweep, folder, {})
        if not any(worker.is_alive for worker in sweep.workers) and all(t.state in ENDED for t in sweep.trials):
            return read_sweep(folder)
        assert time.monotonic() < deadline, (folder / "workers.txt").read_text()
        time.sleep(0.5)


@pytest.mark.slow
def test_asha_sweep_ends_with_its_best_trial_and_pauses_the_others(tmp_path, capsys):
    folder = tmp_path / "s"
    words = ["sweep.pruning=asha", "sweep.min_steps=3", "sweep.parallel=2", "optimizer.lr=1e-5,1e-2,1e-4"]
    assert main(["submit", "-m", "cluster=local", *TINY, *words, f"sweep_dir={folder}"]) == 0
    sweep = wait_for(folder)
    assert [trial.state for trial in sweep.trials] == ["paused", "finished", "paused"]
    for trial in sweep.trials:
        with (folder / trial.name / "metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["validation_loss"]]
        seen = {int(row["step"]): float(row["validation_loss"]) for row in rows}
        assert trial.rung_values == [pytest.approx(seen[3])]
        assert max(seen) == (9 if trial.state == "finished" else 3)
    assert min(trial.rung_values for trial in sweep.trials) == sweep.trials[1].rung_values
    assert main(["sweep", "status", str(folder)]) == 0
    assert "rungs (asha): 3 reached step 3, 1 reached the end" in capsys.readouterr().out
    assert main(["sweep", "retry", str(folder), "failed=true"]) == 2, "a paused trial has not failed"
    assert main(["sweep", "retry", str(folder), "trials=[lr1e-4]"]) == 0
    again = wait_for(folder).trial("lr1e-4")
    assert (again.state, again.result["steps"], again.rung_values) == ("finished", 9, sweep.trials[2].rung_values)
