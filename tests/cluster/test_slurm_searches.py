"""The choice of trials, their early end, and shared processes, each in the slots of a real SLURM."""

import json
from pathlib import Path

import pytest
from brute_force import trials_of
from slurm_cluster import wait_for
from test_slurm_pruning import is_idle
from test_slurm_sweep import SETUP, TINY, seen

from lightning_peft.__main__ import main
from lightning_peft.commands.plan_sweep import dimensions
from lightning_peft.sweeps.place import find_jobs
from lightning_peft.sweeps.search import OptunaStudy
from lightning_peft.sweeps.sweep import Sweep

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

SECONDS = 900
WORDS = ["trainer.max_steps=6", "sweep.min_steps=2", "logger=csv", SETUP]
RUNG, END = 2, 6


def is_done(sweep: Sweep) -> bool:
    return len(sweep.trials) == sweep.count and is_idle(sweep)


def test_optuna_with_hyperband_and_median_with_shared_processes_run_in_slots_at_once(slurm, tmp_path, capsys):
    """Two sweeps on one cluster: each ends as its own rule says of the losses in its trials' metrics.csv."""
    pytest.importorskip("optuna", reason="pip install 'lightning-peft[optuna]'")
    drawn, shared = tmp_path / "drawn", tmp_path / "shared"
    searched = ["adapter.rank=2,4,8", "optimizer.lr=tag(log,interval(1e-4,1e-2))"]
    search = ["sweep.search=optuna", "sweep.trials=5", "sweep.parallel=2", "sweep.pruning=hyperband"]
    assert main(["submit", "-m", *TINY, *WORDS, *searched, *search, f"sweep_dir={drawn}"]) == 0
    grid = ["optimizer.lr=1e-2,1e-3,1e-4,1e-5", "sweep.together=2", "sweep.parallel=1", "sweep.pruning=median"]
    assert main(["submit", "-m", *TINY, *WORDS, *grid, f"sweep_dir={shared}"]) == 0
    wait_for("the end of both", SECONDS, lambda: is_done(seen(drawn)) and is_done(seen(shared)))
    for folder in (drawn, shared):
        assert {job.state for job in find_jobs(seen(folder)).values()} == {"COMPLETED"}

    check_hyperband(drawn, seen(drawn))
    # The first two are less than WARM_UP trials when they stand at the rung; the others, worse than the median, stop.
    trials = seen(shared).trials
    assert [trial.state for trial in trials] == ["finished", "finished", "paused", "paused"]
    files = trials_of(shared)
    assert [trial.rung_values for trial in trials] == [[files[trial.name].losses[RUNG]] for trial in trials]
    assert max(v for t in trials[:2] for v in t.rung_values) < min(v for t in trials[2:] for v in t.rung_values)

    for folder, said in ((drawn, "rungs (hyperband): 3 reached step 2, 3 reached the end"), (shared, "rungs (median)")):
        capsys.readouterr()
        assert main(["sweep", "status", str(folder)]) == 0
        assert said in " ".join(capsys.readouterr().out.split())
        assert main(["sweep", "table", str(folder), f"output_path={folder}/table.json"]) == 0
        listed = {row["trial"]: row["validation_loss"] for row in json.loads((folder / "table.json").read_text())}
        assert listed == {name: trial.losses[max(trial.steps)] for name, trial in trials_of(folder).items()}
        assert main(["report", str(folder)]) == 0


def check_hyperband(folder: Path, sweep: Sweep) -> None:
    """Check that three of five trials pause at the rung, of which the best goes on; the other bracket's two never."""
    files = trials_of(folder)
    halved = [trial for trial in sweep.trials if trial.bracket == 0]
    assert len(halved) == 3 and [trial.rung_values for trial in halved] == [
        [files[trial.name].losses[RUNG]] for trial in halved
    ]
    best = min(halved, key=lambda trial: files[trial.name].losses[RUNG])
    finished = [trial for trial in sweep.trials if trial.state == "finished"]
    assert finished == [trial for trial in sweep.trials if trial is best or trial.bracket == 1]
    assert {trial.state for trial in halved if trial is not best} == {"paused"}
    for trial in sweep.trials:
        last = END if trial in finished else RUNG
        assert files[trial.name].steps == list(range(1, last + 1)), trial.name

    # The study was told what each trial had reached when the next one was drawn.
    told = OptunaStudy(folder, dimensions(sweep), sweep.seed).study.trials
    assert [trial.number for trial in told] == [trial.number for trial in sweep.trials] == list(range(5))
    ended = [(known, files[t.name]) for known, t in zip(told, sweep.trials, strict=True) if known.state.is_finished()]
    assert len(ended) >= 3
    for known, trial in ended:
        step, value = (END, known.value) if known.state.name == "COMPLETE" else (RUNG, known.intermediate_values[RUNG])
        assert value == trial.losses[step] and known.params["optimizer.lr"] == pytest.approx(trial.rate, rel=1e-5)
