"""A pruned sweep on a real SLURM: slots that take one trial after the other, through whatever ends a job."""

import os
import shutil
import signal
from pathlib import Path

import pytest
from brute_force import trials_of
from pruned_sweep import SWEPT, WORDS, check_pruned_sweep
from safetensors.torch import load_file
from slurm_cluster import SlurmCluster, wait_for
from test_slurm_sweep import SETUP, TINY, seen

from lightning_peft.__main__ import main
from lightning_peft.commands.train import train
from lightning_peft.compose import compose_config
from lightning_peft.sweeps.place import find_jobs
from lightning_peft.sweeps.sweep import ENDED, Sweep

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

SECONDS = 2400


def is_idle(sweep: Sweep) -> bool:
    """Return whether no slot has anything left to do, and all have left."""
    jobs = find_jobs(sweep).values()
    return all(trial.state in ENDED for trial in sweep.trials) and not any(job.is_active for job in jobs)


def processes_of(run_dir: Path) -> list[int]:
    """Return the processes that train in a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if f"config_path={run_dir}/config.yaml".encode() in words and b"srun" not in words[0]:
            found.append(int(path.parent.name))
    return found


def test_slots_run_prune_and_go_on_bit_equal(slurm: SlurmCluster, tmp_path: Path, capsys):
    folder = tmp_path / "my sweep"
    words = ["optimizer.lr=1e-5,1e-2,1e-4,1e-3", "trainer.max_steps=9", "sweep.pruning=asha", "sweep.min_steps=3"]
    assert main(["submit", "-m", *TINY, *words, "sweep.parallel=2", f"sweep_dir={folder}", SETUP]) == 0
    (array,) = seen(folder).arrays
    assert f"job {array}: 4 trials in {folder}, 2 tasks" in capsys.readouterr().out
    wait_for("the end of the sweep", SECONDS, lambda: is_idle(seen(folder)))
    sweep = seen(folder)
    assert {trial.name: trial.state for trial in sweep.trials} == {
        "lr1e-5": "paused", "lr1e-2": "finished", "lr1e-4": "paused", "lr1e-3": "paused"
    }  # fmt: skip
    files = trials_of(folder)
    for trial in sweep.trials:
        assert trial.rung_values == [files[trial.name].losses[3]] and trial.job is None
    assert {job.state for job in find_jobs(sweep).values()} == {"COMPLETED"}
    assert main(["sweep", "status", str(folder)]) == 0
    assert "rungs (asha): 4 reached step 3, 1 reached the end" in capsys.readouterr().out
    assert main(["sweep", "retry", str(folder), "failed=true"]) == 2, "a paused trial has not failed"

    # The one that paused and was promoted is the run that never paused.
    (tmp_path / "alone").mkdir()
    shutil.copy(folder / "lr1e-2" / "config.yaml", tmp_path / "alone")  # a copy trains in its own folder
    config = compose_config("train", [f"config_path={tmp_path}/alone/config.yaml"])
    assert config.pause_at is None
    train(config)
    one, other = (
        load_file(run / "adapter" / "adapter_model.safetensors") for run in (folder / "lr1e-2", tmp_path / "alone")
    )
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)

    assert main(["sweep", "retry", str(folder), "trials=[lr1e-3]"]) == 0
    wait_for("the end of the retry", SECONDS, lambda: is_idle(seen(folder)))
    assert [trial.state for trial in seen(folder).trials] == ["paused", "finished", "paused", "finished"]


def test_three_key_three_seed_sweep_survives_what_ends_jobs_and_its_table_is_right(slurm, tmp_path, capsys):
    """36 trials; one is killed, one's slot is cancelled, and all others are preempted on their way."""
    folder = tmp_path / "sweep"
    assert main(["submit", "-m", *TINY, *WORDS, *SWEPT, "sweep.parallel=3", f"sweep_dir={folder}", SETUP]) == 0
    (array,) = seen(folder).arrays

    def running(slot: int) -> str | None:
        """Return the trial that a slot trains, once it takes steps."""
        found = [t.name for t in seen(folder).trials if t.job == f"{array}_{slot}"]
        return next(
            (name for name in found if (folder / name / "metrics.csv").exists() and processes_of(folder / name)), None
        )

    wait_for("a trial of slot 0", SECONDS, lambda: running(0))
    killed = running(0)
    for process in processes_of(folder / killed):
        os.kill(process, signal.SIGKILL)
    wait_for("that the sweep knows of it", SECONDS, lambda: seen(folder).trial(killed).state == "failed")
    wait_for("a trial of slot 1", SECONDS, lambda: running(1))
    cancelled = running(1)
    slurm.run("scancel", f"{array}_1")
    wait_for("that the sweep knows of it", SECONDS, lambda: seen(folder).trial(cancelled).state in ENDED)
    wait_for("trials of the others", SECONDS, lambda: running(0) and running(2))
    slurm.run("sbatch", "--partition=high", "--nodes=2", "--exclusive", f"--chdir={tmp_path}", "--wrap=sleep 2")
    wait_for("that they are preempted", SECONDS, lambda: any(j.restarts for j in find_jobs(seen(folder)).values()))
    wait_for("the end of the slots", SECONDS, lambda: is_idle(seen(folder)))

    states = [trial.state for trial in seen(folder).trials]
    assert states.count("failed") == 1 and not {"lost", "preempted", "diverged"} & {*states}
    assert seen(folder).trial(cancelled).state in ("cancelled", "paused", "finished"), "it may have been at its rung"
    capsys.readouterr()
    assert main(["sweep", "retry", str(folder), "failed=true"]) == 0
    wait_for("the end of the retry", SECONDS, lambda: is_idle(seen(folder)))
    check_pruned_sweep(folder, seen(folder), capsys)
