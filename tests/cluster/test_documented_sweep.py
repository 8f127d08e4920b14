"""The sweep of the docs on this machine: killed once, gone on with, and right against the files of its trials."""

import os
import signal
import time
from pathlib import Path

import pytest
from brute_force import trials_of
from pruned_sweep import SWEPT, WORDS, check_pruned_sweep
from test_local_sweep import TINY, has_ended, seen, wait_until

from lightning_peft.__main__ import main
from lightning_peft.sweeps.sweep import Sweep

pytestmark = pytest.mark.slow

SECONDS = 1800


def kill_everything(folder: Path) -> list[str]:
    """As where the machine goes down: workers and trials are gone at once. Returns the trials that ran."""
    sweep = seen(folder)
    running = [trial for trial in sweep.trials if trial.state == "running" and trial.process is not None]
    for process in {*sweep.workers, *(trial.process for trial in running)}:
        os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while any(process.is_alive for process in [*sweep.workers, *(trial.process for trial in running)]):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return [trial.name for trial in running]


def is_on_its_way(sweep: Sweep) -> bool:
    """Whether some trials are behind their rung, and others on their way to it."""
    states = [trial.state for trial in sweep.trials]
    return states.count("paused") >= 5 and "running" in states


@pytest.mark.parametrize("together", [[], ["sweep.together=6"]], ids=["alone", "together"])
def test_sweep_of_the_docs_is_killed_goes_on_and_is_right(tmp_path, capsys, together):
    folder = tmp_path / "my sweep"
    words = [*TINY, *WORDS, *SWEPT, "cluster=local", "sweep.parallel=2", "checkpoint.every_n_steps=1"]
    assert main(["submit", "-m", *words, *together, f"sweep_dir={folder}"]) == 0
    wait_until(folder, is_on_its_way, SECONDS)
    killed = kill_everything(folder)
    states = {trial.name: trial.state for trial in seen(folder).trials}
    assert killed and {states[name] for name in killed} <= {"lost", "paused", "finished"}
    assert main(["sweep", "status", str(folder)]) == 0
    assert main(["sweep", "retry", str(folder), "failed=true"]) == 0
    wait_until(folder, lambda sweep: has_ended(sweep) and not any(w.is_alive for w in sweep.workers), SECONDS)
    check_pruned_sweep(folder, seen(folder), capsys)


RATES = "optimizer.lr=1e-4,1e-3,1e-2,1e-1"
ASHA = ["sweep.pruning=asha", "sweep.min_steps=3"]


def test_asha_of_sixteen_trials_comes_to_the_best_of_the_grid(tmp_path):
    """Within the spread of the seeds, for at most 0.45 of the grid's steps."""
    words = ["model=tiny", "data.max_rows=64", "data.max_validation_rows=16", *TINY[3:5], "validation.samples=0"]
    words += ["trainer.max_steps=27", "logger=csv", "checkpoint.every_n_steps=null", "sweep.together=8"]
    words += ["cluster=local", "data.micro_batch_size=2", "data.max_length=512"]

    def trained(name: str, *more: str) -> dict[str, tuple[float | None, int]]:
        """Of each trial the loss at the end, null for one that did not get there, and the steps it took."""
        folder = tmp_path / name
        assert main(["submit", "-m", *words, *more, f"sweep_dir={folder}"]) == 0
        wait_until(folder, lambda sweep: has_ended(sweep) and not any(w.is_alive for w in sweep.workers), SECONDS)
        return {trial: (found.losses.get(27), max(found.steps)) for trial, found in trials_of(folder).items()}

    grid = trained("grid", RATES, "adapter.rank=2,4,8,16")
    pruned = trained("asha", RATES, "adapter.rank=2,4,8,16", *ASHA)
    assert len(grid) == len(pruned) == 16 and {steps for _, steps in grid.values()} == {27}
    best = min(grid, key=lambda name: grid[name][0])
    rank, rate = best.removeprefix("lr").split("_rank")[::-1]
    seeds = trained("seeds", f"optimizer.lr={rate}", f"adapter.rank={rank}", "seed=0,1,2,3")
    losses = [loss for loss, _ in seeds.values()]
    noise = max(losses) - min(losses)
    reached = min(loss for loss, _ in pruned.values() if loss is not None)
    assert reached <= grid[best][0] + noise
    taken = sum(steps for _, steps in pruned.values()) / sum(steps for _, steps in grid.values())
    print(f"grid {grid[best][0]:.4f}, asha {reached:.4f}, seeds apart by {noise:.4f}; {taken:.3f} of the steps")
    assert taken <= 0.45
