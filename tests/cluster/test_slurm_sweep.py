"""A sweep as a job array of a real SLURM: states, a trial that fails, a retry, a cancelled rest, Optuna's draws."""

import json
from pathlib import Path

import pytest
import yaml
from slurm_cluster import wait_for
from test_local_sweep import TINY, has_ended

from lightning_peft.__main__ import main
from lightning_peft.sweeps.place import find_jobs
from lightning_peft.sweeps.sweep import Sweep, changed_sweep, refresh

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

REPOSITORY = Path(__file__).parent.parent.parent
SETUP = f"cluster.setup=['export OMP_NUM_THREADS=1 PYTHONPATH={REPOSITORY}']"
SECONDS = 400


def seen(folder: Path) -> Sweep:
    with changed_sweep(folder) as sweep:
        refresh(sweep, folder, find_jobs(sweep))
    return sweep


def is_over(sweep: Sweep) -> bool:
    """Return whether SLURM too has done with every trial: the result stands before the job ends."""
    return has_ended(sweep) and all(trial.exit_code is not None for trial in sweep.trials)


def test_array_with_a_failing_trial_and_its_retry(slurm, tmp_path, capsys):
    folder, rows = tmp_path / "sweep", tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n} + 1 =", "completion": str(n + 1)}) + "\n" for n in range(12)))
    words = ["data=jsonl", f"sweep_dir={folder}", f"data.train_path={rows},{tmp_path}/missing.jsonl", SETUP]
    assert main(["submit", "-m", *TINY, *words]) == 0
    (array,) = seen(folder).arrays
    assert f"job {array}: 2 trials" in capsys.readouterr().out
    wait_for("the end of the array", SECONDS, lambda: is_over(seen(folder)))
    assert [(trial.state, trial.exit_code) for trial in seen(folder).trials] == [("finished", 0), ("failed", 2)]
    (tmp_path / "missing.jsonl").write_text(rows.read_text())
    assert main(["sweep", "retry", str(folder), "failed=true"]) == 0
    wait_for("the end of the retry", SECONDS, lambda: is_over(seen(folder)))
    assert [(trial.state, trial.attempts) for trial in seen(folder).trials] == [("finished", 1), ("finished", 2)]


def test_cancel_ends_running_and_queued_trials(slurm, tmp_path):
    folder = tmp_path / "sweep"
    words = ["trainer.max_steps=100000", "adapter.rank=2,4", f"sweep_dir={folder}", "sweep.parallel=1", SETUP]
    assert main(["submit", "-m", *TINY, *words]) == 0
    wait_for("the first trial's start", SECONDS, lambda: seen(folder).trials[0].state == "running")
    assert seen(folder).trials[1].state == "waiting"
    assert main(["sweep", "cancel", str(folder)]) == 0
    wait_for("the end of both", SECONDS, lambda: has_ended(seen(folder)))
    assert [trial.state for trial in seen(folder).trials] == ["cancelled", "cancelled"]


def test_task_that_is_cancelled_before_it_starts_is_said_so(slurm, tmp_path, capsys):
    """slurmctld drops such a task at once, so nothing but its absence tells of it."""
    folder = tmp_path / "sweep"
    words = ["trainer.max_steps=100000", "adapter.rank=2,4,8", f"sweep_dir={folder}", "sweep.parallel=1", SETUP]
    assert main(["submit", "-m", *TINY, *words]) == 0
    wait_for("the first trial's start", SECONDS, lambda: seen(folder).trials[0].state == "running")
    wait_for("its log", SECONDS, lambda: list(folder.glob("slurm-*_0.log")))
    slurm.run("scancel", str(seen(folder).trials[1].job))
    assert [trial.state for trial in seen(folder).trials] == ["running", "cancelled", "waiting"]
    assert main(["sweep", "status", str(folder)]) == 0
    assert "3 trials: 1 running, 1 cancelled, 1 waiting" in capsys.readouterr().out
    assert main(["sweep", "cancel", str(folder)]) == 0
    wait_for("the end of all", SECONDS, lambda: has_ended(seen(folder)))
    assert [trial.state for trial in seen(folder).trials] == ["cancelled"] * 3
    assert main(["sweep", "retry", str(folder), "failed=true", "trainer.max_steps=2"]) == 0
    wait_for("the end of the retry", SECONDS, lambda: is_over(seen(folder)))
    assert [trial.state for trial in seen(folder).trials] == ["finished"] * 3


def test_trials_of_a_task_train_together_and_one_is_cancelled(slurm, tmp_path):
    """A cancelled trial of four in two tasks leaves the other of its task alone, and is not started again."""
    folder = tmp_path / "sweep"
    words = ["method=lora,rslora", "adapter.rank=2,4", "trainer.max_steps=60", "sweep.together=2", "logger=csv"]
    assert main(["submit", "-m", *TINY, *words, f"sweep_dir={folder}", SETUP]) == 0
    (array,) = seen(folder).arrays
    cancelled, beside, *others = seen(folder).trials
    assert {trial.job for trial in (cancelled, beside)} == {f"{array}_0"}
    assert {trial.job for trial in others} == {f"{array}_1"}
    wait_for("a step", SECONDS, (folder / cancelled.name / "metrics.csv").exists)
    assert main(["sweep", "cancel", str(folder), f"trials=[{cancelled.name}]"]) == 0
    wait_for("the end of the array", SECONDS, lambda: is_over(seen(folder)))
    assert [(trial.state, trial.exit_code) for trial in seen(folder).trials] == [
        ("cancelled", 0),
        *3 * [("finished", 0)],
    ]
    assert json.loads((folder / cancelled.name / "result.json").read_text())["steps"] < 60
    assert {job.restarts for job in find_jobs(seen(folder)).values()} == {0}


def test_tasks_of_an_array_draw_their_trials_from_one_study(slurm, tmp_path):
    pytest.importorskip("optuna", reason="pip install 'lightning-peft[optuna]'")
    folder = tmp_path / "sweep"
    searched = ["adapter.rank=2,4,8", "optimizer.lr=tag(log,interval(1e-4,1e-2))"]
    search = ["sweep.search=optuna", "sweep.trials=4", "sweep.parallel=2", f"sweep_dir={folder}", SETUP]
    assert main(["submit", "-m", "cluster=slurm", *TINY, *searched, *search]) == 0
    wait_for("the end of the array", SECONDS, lambda: is_over(seen(folder)))

    trials = seen(folder).trials
    assert [(trial.state, trial.exit_code, trial.number) for trial in trials] == [("finished", 0, n) for n in range(4)]
    trained = [yaml.safe_load((folder / trial.name / "config.yaml").read_text()) for trial in trials]
    drawn = [(config["adapter"]["rank"], config["optimizer"]["lr"]) for config in trained]
    assert len(set(drawn)) == 4
    assert drawn == [(int(t.values["adapter.rank"]), float(t.values["optimizer.lr"])) for t in trials]
    assert main(["sweep", "table", str(folder), f"output_path={tmp_path}/table.json"]) == 0
    listed = {row["trial"]: row["validation_loss"] for row in json.loads((tmp_path / "table.json").read_text())}
    results = {t.name: json.loads((folder / t.name / "result.json").read_text())["validation_loss"] for t in trials}
    assert listed == results and len(set(results.values())) == 4
