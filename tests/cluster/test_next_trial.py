"""The trial that a slot is given: its own after an interruption, else the next; nothing twice and nothing lost."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from lightning_peft.cluster.job import Job
from lightning_peft.commands.together import wanted
from lightning_peft.sweeps.next_trial import turn_of_slot, work_to_begin
from lightning_peft.sweeps.sweep import Sweep, Trial, changed_sweep, read_sweep, write_sweep


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    trials = [Trial(f"t{n}", [f"seed={n}"]) for n in range(4)]
    for trial in trials:
        (tmp_path / trial.name).mkdir()
        (tmp_path / trial.name / "config.yaml").write_text("trainer: {devices: 1, num_nodes: 1}\npause_at: null\n")
    write_sweep(
        Sweep([], ["seed=range(4)"], "slurm", "validation_loss", pruning="asha", rungs=[3], count=4, trials=trials,
              arrays=["71"]), tmp_path,
    )  # fmt: skip
    return tmp_path


def turn(folder: Path, task: str, ended: int | None = None, of: Sequence[str] = (), **states: str) -> list[str]:
    """Return what a slot gets that says how `of` ended; tasks are in these states, running unless said otherwise."""
    queue = {f"71_{n}": Job(f"71_{n}", states.get(f"task{n}", "RUNNING"), 0, 0) for n in range(3)}
    with changed_sweep(folder) as sweep:
        return [trial.name for trial in turn_of_slot(sweep, folder, task, ended, queue, of)]


def leaves(folder: Path, name: str, status: str, steps: int = 3, loss: float | None = None, hours: float = 0.0) -> None:
    result = {"status": status, "steps": steps, "validation_loss": loss, "metrics": {}, "device_hours": hours}
    (folder / name / "result.json").write_text(json.dumps(result))


def test_slot_runs_what_it_began_until_that_is_over(folder):
    assert turn(folder, "71_0") == ["t0"]
    assert "pause_at: 3" in (folder / "t0" / "config.yaml").read_text()
    assert turn(folder, "71_0") == ["t0"], "requeued after a kill"
    leaves(folder, "t0", "preempted", 2)
    assert turn(folder, "71_0") == ["t0"], "requeued after a signal"
    assert turn(folder, "71_1") == ["t1"], "nobody else takes what another slot runs"
    assert read_sweep(folder).trial("t0").attempts == 1
    leaves(folder, "t0", "paused", loss=2.0)
    assert turn(folder, "71_0") == ["t2"], "the slot was killed before it could ask"
    sweep = read_sweep(folder)
    assert sweep.trial("t0").rung_values == [2.0] and sweep.trial("t0").job is None
    assert [trial.state for trial in sweep.trials] == ["paused", "running", "running", "waiting"]


def test_trial_that_crashed_is_left_to_a_retry_and_the_slot_goes_on(folder):
    assert turn(folder, "71_0") == ["t0"]
    assert turn(folder, "71_0", ended=137) == ["t1"]
    leaves(folder, "t1", "failed")
    assert turn(folder, "71_0", ended=1) == ["t2"]
    trials = read_sweep(folder).trials
    assert [(trial.state, trial.exit_code) for trial in trials[:2]] == [("failed", 137), ("failed", 1)]


def test_slot_whose_answer_was_lost_is_given_what_it_was_given(folder):
    assert turn(folder, "71_0") == ["t0"]
    assert turn(folder, "71_0", ended=137, of=["t0"]) == ["t1"]
    assert turn(folder, "71_0", ended=137, of=["t0"]) == ["t1"], "which nobody has begun, so it did not end"
    trials = read_sweep(folder).trials
    assert [(trial.state, trial.exit_code, trial.attempts) for trial in trials[:2]] == [
        ("failed", 137, 1), ("running", None, 1)
    ]  # fmt: skip
    leaves(folder, "t1", "paused", 2)
    for _ in range(2):
        assert turn(folder, "71_0", ended=75, of=["t1"]) == ["t1"], "its time limit is known already"


def test_trial_that_a_slot_gave_up_is_left_to_a_retry(folder):
    assert turn(folder, "71_0") == ["t0"]
    leaves(folder, "t0", "preempted", 2)
    assert turn(folder, "71_0", ended=1, of=["t0"]) == ["t1"]
    assert (read_sweep(folder).trial("t0").state, read_sweep(folder).trial("t0").exit_code) == ("preempted", 1)


def test_promoted_trial_comes_before_one_that_nobody_has_begun(folder):
    for task in range(3):
        assert turn(folder, f"71_{task}") == [f"t{task}"]
    for name, loss in (("t0", 3.0), ("t1", 1.0), ("t2", 2.0)):
        leaves(folder, name, "paused", loss=loss)
    assert turn(folder, "71_0", ended=75) == ["t3"], "two others may still be better, for all that is known"
    assert turn(folder, "71_1", ended=75) == [], "of two that have a value there none goes on"
    assert turn(folder, "71_2", ended=75) == ["t1"]
    sweep = read_sweep(folder)
    assert (sweep.trial("t1").attempts, sweep.trial("t1").job) == (2, "71_2")
    assert "pause_at: null" in (folder / "t1" / "config.yaml").read_text()
    leaves(folder, "t1", "finished", 9, 0.5)
    leaves(folder, "t3", "paused", loss=4.0)
    assert turn(folder, "71_2", ended=0) == [] and turn(folder, "71_0", ended=75) == []
    assert work_to_begin(read_sweep(folder)) == 0


def test_trial_of_a_slot_that_is_no_more_goes_on_in_another(folder):
    assert turn(folder, "71_0") == ["t0"]
    leaves(folder, "t0", "preempted", 2)
    assert turn(folder, "71_1", task0="TIMEOUT") == ["t0"]
    assert read_sweep(folder).trial("t0").resumed_at == 2
    assert turn(folder, "71_0", task0="TIMEOUT") == ["t1"], "the first one, should it come back"


def test_cancelled_trial_is_not_gone_on_with(folder):
    assert turn(folder, "71_0") == ["t0"]
    with changed_sweep(folder) as sweep:
        sweep.trial("t0").is_cancelled = True
    leaves(folder, "t0", "preempted", 2)
    assert turn(folder, "71_0", ended=75) == ["t1"]
    assert read_sweep(folder).trial("t0").state == "cancelled"


def test_time_limit_of_a_start_is_no_rung(folder):
    assert turn(folder, "71_0") == ["t0"]
    leaves(folder, "t0", "paused", 2)
    assert turn(folder, "71_0", ended=75) == ["t0"]
    leaves(folder, "t0", "paused", 2)
    assert turn(folder, "71_0", ended=75) == ["t1"], "one that gets no further is left to a retry"
    assert read_sweep(folder).trial("t0").rung_values == []


def test_nothing_begins_once_the_budget_is_spent(folder):
    with changed_sweep(folder) as sweep:
        sweep.budget_gpu_hours = 1.0
    assert turn(folder, "71_0") == ["t0"]
    leaves(folder, "t0", "preempted", 2, hours=0.9)
    assert turn(folder, "71_0") == ["t0"], "what has begun goes on to its rung"
    leaves(folder, "t0", "paused", loss=1.0, hours=0.1)
    assert turn(folder, "71_0", ended=75) == [] and read_sweep(folder).is_spent


def test_group_shares_a_slot(folder):
    with changed_sweep(folder) as sweep:
        sweep.together = 2
        for trial in sweep.trials:
            trial.base = "same"
    assert turn(folder, "71_0") == ["t0", "t1"]
    leaves(folder, "t0", "paused", loss=1.0)
    leaves(folder, "t1", "preempted", 2)
    assert turn(folder, "71_0") == ["t1"], "of a group that was requeued those that are not there yet"
    leaves(folder, "t1", "paused", loss=2.0)
    assert turn(folder, "71_0", ended=75) == ["t2", "t3"]


def test_sweep_of_this_machine_inside_a_job_array_has_no_tasks(folder, monkeypatch):
    """Its trials were taken for those of a task that had ended them, and were left out."""
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "71")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    assert wanted([folder / "t0"]) == []
    with changed_sweep(folder) as sweep:
        sweep.cluster = "local"
    assert wanted([folder / "t0"]) == [folder / "t0"]
