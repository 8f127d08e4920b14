"""A sweep's budget: hours by what trials have written, and workers that begin nothing once it is spent."""

import json
from pathlib import Path

import pytest

from lightning_peft.__main__ import main
from lightning_peft.cluster.process import this_process
from lightning_peft.commands import sweep as command
from lightning_peft.sweeps.budget import spent_hours
from lightning_peft.sweeps.local_worker import claim
from lightning_peft.sweeps.sweep import Sweep, Trial, begin, changed_sweep, read_sweep, refresh, write_sweep


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a sweep of two trials that ended, one that was killed on two devices, and two that are not begun."""
    trials = [Trial(f"t{n}", [f"seed={n}"], attempts=n < 3, is_waiting=n > 2) for n in range(5)]
    for trial in trials:
        (tmp_path / trial.name).mkdir()
        config = "trainer: {devices: 2, num_nodes: 1}\npause_at: null\n"
        (tmp_path / trial.name / "config.yaml").write_text(config)
    for name, status, hours in (("t0", "finished", 1.5), ("t1", "paused", 0.25)):
        result = {"status": status, "steps": 3, "device_hours": hours, "seconds": 9.0, "validation_loss": 2.0}
        (tmp_path / name / "result.json").write_text(json.dumps(result))
    (tmp_path / "t2" / "metrics.csv").write_text("step,step_seconds\n1,1800\n2,900\n2,\n")
    sweep = Sweep(
        [], ["seed=range(5)"], "local", "validation_loss", budget_gpu_hours=4.0, pruning="asha", rungs=[3], count=5,
        parallel=1, trials=trials, workers=[this_process()], directory=str(tmp_path),
    )  # fmt: skip
    write_sweep(sweep, tmp_path)
    return tmp_path


def test_hours_are_those_of_results_and_of_logged_steps(folder):
    with changed_sweep(folder) as sweep:
        refresh(sweep, folder, {})
        assert spent_hours(sweep, folder) == pytest.approx(1.5 + 0.25 + 2 * 0.75)
        begin(sweep.trial("t1"), folder)  # its result goes, its hours stay
        refresh(sweep, folder, {})
        assert spent_hours(sweep, folder) == pytest.approx(3.25)
        (folder / "t1" / "result.json").write_text(json.dumps({"status": "finished", "seconds": 3600.0}))
        refresh(sweep, folder, {})
        assert spent_hours(sweep, folder) == pytest.approx(4.25)


def test_nothing_begins_once_the_budget_is_spent(folder, capsys, monkeypatch):
    (taken,) = claim(folder)
    assert taken.name == "t3"
    with changed_sweep(folder) as sweep:  # it ends in no time, and the next one is within the budget no longer
        sweep.trial("t3").process = None
        (folder / "t3" / "result.json").write_text(json.dumps({"status": "failed", "device_hours": 0.75}))
    assert claim(folder) == [] and this_process() not in read_sweep(folder).workers
    assert main(["sweep", "status", str(folder)]) == 0
    said = capsys.readouterr().out.replace("\n", " ")
    assert "budget: 4 of 4 device hours; spent, so 1 trials are not begun and 1 stay at a rung" in said
    assert read_sweep(folder).trial("t4").state == "waiting"

    assert main(["sweep", "retry", str(folder), "failed=true"]) == 2
    assert "budget: 4 of 4 device hours; spent" in capsys.readouterr().err
    started = []
    monkeypatch.setattr(command, "start_workers", started.append)  # workers are processes of their own
    assert main(["sweep", "retry", str(folder), "sweep.budget_gpu_hours=6"]) == 0
    assert started == [folder]
    with changed_sweep(folder) as sweep:
        assert sweep.budget_gpu_hours == 6 and not sweep.is_spent
        sweep.workers = [this_process()]
    assert [trial.name for trial in claim(folder)] == ["t4"]


def test_retry_keeps_to_the_slots_that_may_run_at_once(tmp_path, monkeypatch, capsys):
    folder, queue = tmp_path / "s", tmp_path / "queue"
    commands = {"sbatch": f'grep -- --array= "$2" >> {tmp_path}/submitted; echo 71', "scontrol": f"cat {queue}"}
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    words = ["model=tiny", "seed=1,2,3,4", "sweep.parallel=2", "sweep.budget_gpu_hours=1", f"sweep_dir={folder}"]
    assert main(["submit", "-m", "cluster=slurm", *words]) == 0

    def submitted(budget: int, *states: str) -> list[str]:
        """Return the arrays that a retry submits, where the tasks of the first are in these states."""
        task = "JobId={} ArrayJobId=71 ArrayTaskId={} JobState={} ExitCode=0:0 Restarts=0\n"
        queue.write_text("".join(task.format(72 + n, n, state) for n, state in enumerate(states)))
        (tmp_path / "submitted").write_text("")
        assert main(["sweep", "retry", str(folder), f"sweep.budget_gpu_hours={budget}"]) == 0
        return (tmp_path / "submitted").read_text().splitlines()

    assert (tmp_path / "submitted").read_text() == "#SBATCH --array=0-1\n"
    assert submitted(2, "PENDING", "PENDING") == [], "which ask once they start"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "71")
    for task in range(2):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        assert main(["sweep", "ask", str(folder)]) == 0
    assert submitted(3, "RUNNING", "RUNNING") == []
    assert "sweep.parallel=2 slots are there already" in capsys.readouterr().out
    assert submitted(4, "RUNNING", "FAILED") == ["#SBATCH --array=0-0"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sweep.budget_gpu_hours=0"], "sweep.budget_gpu_hours=0.0: must be above 0"),
        (["sweep.budget_gpu_hours=nan"], "sweep.budget_gpu_hours=nan: must be a finite number"),
        (["sweep.budget_gpu_hours=2", "cluster=kubernetes"], "cluster=kubernetes: is kept with cluster=local or slurm"),
    ],
)
def test_wrong_budget_is_named(tmp_path, capsys, words, message):
    assert main(["submit", "-m", "cluster=local", "model=tiny", f"sweep_dir={tmp_path}/s", "seed=1,2", *words]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "s").exists()
