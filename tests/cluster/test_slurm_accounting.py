"""What sacct says of jobs that SLURM's controller has forgotten: every end a job can come to, and a sweep's states."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import MEMORY_CGROUPS, NODES, SlurmCluster, end_daemon, wait_for
from test_local_sweep import TINY, has_ended
from test_slurm_sweep import SETUP, seen

from lightning_peft.__main__ import main
from lightning_peft.cluster.job import Job
from lightning_peft.cluster.slurm import BEGUN, Slurm
from lightning_peft.sweeps.sweep import TO_BE_RETRIED

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

SECONDS = 240
EATER = "python3 -c 'bytes(4 * 10**8).replace(bytes(1), bytes([1]))'"


def is_forgotten(slurm: SlurmCluster, job: str) -> bool:
    """Return whether the controller does not list a job, or a task of an array, any more."""
    known = slurm.ask("squeue", "--noheader", "--array", "--states=all", "--format=%i").split()
    return job not in known if "_" in job else not any(re.split("[_+]", one)[0] == job for one in known)


def submit(slurm: SlurmCluster, folder: Path, command: str, *options: str) -> str:
    common = ["--parsable", f"--output={folder}/%j.log", "--mem=200", "--nodes=1"]
    return slurm.run("sbatch", *common, *options, f"--wrap={command}").strip()


def state(slurm: SlurmCluster, job: str) -> str:
    return slurm.ask("squeue", "--noheader", f"--jobs={job}", "--format=%T").strip()


def is_back(slurm: SlurmCluster, node: str) -> bool:
    slurm.ask("scontrol", "update", f"nodename={node}", "state=resume")
    return "down" not in slurm.ask("sinfo", "--noheader", f"--nodes={node}", "--partition=debug", "--format=%T")


@pytest.fixture(scope="module")
def ended(accounted_slurm: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Yield jobs, by the way they ended, of which the controller knows nothing any more."""
    slurm, folder = accounted_slurm, tmp_path_factory.mktemp("jobs")
    first, second = (f"--nodelist={node}" for node in NODES)
    jobs = {
        "good": submit(slurm, folder, "exit 0", first),
        "bad": submit(slurm, folder, "exit 3", first),
        "killed": submit(slurm, folder, "kill -KILL $$", first),
        "too late": submit(slurm, folder, "sleep 600", first, "--time=1"),
        "cancelled": submit(slurm, folder, "sleep 600", first),
        "cancelled before": submit(slurm, folder, "sleep 600", "--hold"),
        "requeued": submit(slurm, folder, "[ $SLURM_RESTART_COUNT ] || sleep 600", first, "--requeue"),
        "node failed": submit(slurm, folder, "sleep 600", second, "--no-requeue"),
    }
    if slurm.limits_memory:
        jobs["out of memory"] = submit(slurm, folder, EATER, first)
        jobs["ranks out of memory"] = submit(slurm, folder, f"srun {EATER}", first)
    for name in ("cancelled", "requeued", "node failed"):
        wait_for(f"{name} to run", 60, lambda name=name: state(slurm, jobs[name]) == "RUNNING")
    slurm.run("scontrol", "requeue", jobs["requeued"])
    slurm.run("scancel", jobs["cancelled"], jobs["cancelled before"])
    slurm.run("scontrol", "update", f"nodename={NODES[1]}", "state=down", "reason=test")
    wait_for("the node", 60, lambda: is_back(slurm, NODES[1]))
    jobs["preempted"] = submit(slurm, folder, "sleep 600", second, "--no-requeue")
    wait_for("it to run", 60, lambda: state(slurm, jobs["preempted"]) == "RUNNING")
    urgent = submit(slurm, folder, "exit 0", second, "--partition=high", "--exclusive")
    script = folder / "two.sbatch"
    script.write_text("#!/bin/bash\n#SBATCH --ntasks=1\n#SBATCH hetjob\n#SBATCH --ntasks=1\nexit 0\n")
    jobs["of two parts"] = slurm.run("sbatch", "--parsable", f"--output={folder}/two.log", str(script)).strip()
    for name, job in [*jobs.items(), ("urgent", urgent)]:
        wait_for(f"{name} to be forgotten", SECONDS, lambda job=job: is_forgotten(slurm, job))
    yield jobs


@pytest.mark.parametrize(
    ("name", "ended_as", "exit_code"),
    [
        ("good", "COMPLETED", 0),
        ("bad", "FAILED", 3),
        ("killed", "FAILED", 137),
        ("out of memory", "OUT_OF_MEMORY", None),
        ("ranks out of memory", "OUT_OF_MEMORY", 1),
        ("too late", "TIMEOUT", None),
        ("cancelled", "CANCELLED", None),
        ("cancelled before", "CANCELLED", 0),
        ("requeued", "COMPLETED", 0),
        ("node failed", "NODE_FAIL", None),
        ("preempted", "PREEMPTED", None),
        ("of two parts", "COMPLETED", 0),
    ],
)
def test_end_of_a_forgotten_job_is_known(ended: dict[str, str], name: str, ended_as: str, exit_code: int | None):
    if name not in ended:
        pytest.skip(f"no memory is limited without {MEMORY_CGROUPS}")
    job = Slurm().find([ended[name]])[ended[name]]
    assert job.state == ended_as and not job.is_active
    assert exit_code is None or job.exit_code == exit_code


def test_all_are_found_at_once(ended: dict[str, str]):
    assert set(ended.values()) <= set(Slurm().find(ended.values()))


def test_tasks_that_an_array_has_dropped_are_told_apart(accounted_slurm: SlurmCluster, tmp_path: Path):
    """One failed and was forgotten, one was cancelled before it began, and others run and wait still."""
    command = '[ "$SLURM_ARRAY_TASK_ID" = 0 ] && exit 3; sleep 600'
    array = submit(accounted_slurm, tmp_path, command, "--array=0-4%2")
    tasks = [f"{array}_{number}" for number in range(5)]
    wait_for("the second task", 60, lambda: state(accounted_slurm, tasks[2]) == "RUNNING")
    accounted_slurm.run("scancel", tasks[3])
    wait_for("the first to be forgotten", SECONDS, lambda: is_forgotten(accounted_slurm, tasks[0]))
    wait_for("the fourth to be forgotten", SECONDS, lambda: is_forgotten(accounted_slurm, tasks[3]))
    found = Slurm().find([array])
    assert {task: found[task].state for task in found} == {
        tasks[1]: "RUNNING", tasks[2]: "RUNNING", tasks[4]: "PENDING"
    }  # fmt: skip
    (tmp_path / BEGUN).mkdir()
    for task in (array, *tasks[:3]):
        (tmp_path / BEGUN / task).touch()
    recalled = Slurm().recall(tasks, found, tmp_path)
    assert {task: (job.state, job.exit_code) for task, job in recalled.items()} == {
        tasks[0]: ("FAILED", 3), tasks[3]: ("CANCELLED", 0)
    }  # fmt: skip
    accounted_slurm.run("scancel", array)
    wait_for("the array to be forgotten", SECONDS, lambda: is_forgotten(accounted_slurm, array))
    found = Slurm().find([array])
    found |= Slurm().recall(tasks, found, tmp_path)
    states = {task: found[task].state for task in tasks}
    assert states == {task: "FAILED" if task == tasks[0] else "CANCELLED" for task in tasks}


@pytest.mark.parametrize("is_gone", [lambda n: n % 2, lambda n: n % 2 or n % 7 == 0], ids=["odd", "odd and sevenths"])
def test_array_of_many_separate_tasks_is_listed_whole(accounted_slurm: SlurmCluster, tmp_path: Path, is_gone):
    """SLURM writes every second one as 0-198:2, and after 64 characters of others three dots, unless told to go on."""
    array = submit(accounted_slurm, tmp_path, "exit 0", "--array=0-199", "--hold")
    accounted_slurm.run("scancel", *(f"{array}_{number}" for number in range(200) if is_gone(number)))
    active = {job for job, at in Slurm().find([array]).items() if at.is_active}
    assert active == {f"{array}_{number}" for number in range(200) if not is_gone(number)}
    accounted_slurm.run("scancel", array)


def test_held_job_waits(accounted_slurm: SlurmCluster, tmp_path: Path):
    job = submit(accounted_slurm, tmp_path, "sleep 600")
    wait_for("it to run", 60, lambda: state(accounted_slurm, job) == "RUNNING")
    accounted_slurm.run("scontrol", "requeuehold", job)
    wait_for("it to be held", 60, lambda: state(accounted_slurm, job) != "RUNNING")
    assert Slurm().find([job])[job].is_active
    wait_for("it to wait", 60, lambda: Slurm().find([job])[job].state not in ("COMPLETING", "RUNNING"))
    assert Slurm().find([job])[job].is_active
    accounted_slurm.run("scancel", job)


def test_sweep_whose_trials_are_too_large_says_so_and_a_retry_with_more_memory_finishes(
    accounted_slurm: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """One is cancelled before it begins; the logs lie elsewhere, and nothing but the accounts tells what happened."""
    if not accounted_slurm.limits_memory:
        pytest.skip(f"no memory is limited without {MEMORY_CGROUPS}")
    folder = tmp_path / "sweep"
    memory = "cluster.sbatch=['--mem=200','--output={}/elsewhere-%A_%a.log']"
    words = ["trainer.max_steps=100000", "adapter.rank=2,4,8", "sweep.parallel=1", SETUP, memory.format(tmp_path)]
    assert main(["submit", "-m", *TINY, *words, f"sweep_dir={folder}"]) == 0
    (array,) = seen(folder).arrays
    accounted_slurm.run("scancel", f"{array}_1")
    wait_for("the end of all", SECONDS, lambda: has_ended(seen(folder)))
    wait_for("the array to be forgotten", SECONDS, lambda: is_forgotten(accounted_slurm, array))
    capsys.readouterr()
    assert main(["sweep", "status", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "3 trials: 2 failed, 1 cancelled" in said and said.count("failed (out of memory)") == 2
    more = [memory.format(tmp_path).replace("200", "3000"), "trainer.max_steps=2"]
    assert main(["sweep", "retry", str(folder), "failed=true", *more]) == 0
    assert [trial.state for trial in seen(folder).trials] == ["waiting"] * 3
    wait_for("the end of the retry", SECONDS, lambda: has_ended(seen(folder)))
    assert [trial.state for trial in seen(folder).trials] == ["finished"] * 3


def test_accounts_that_do_not_answer_are_said(
    accounted_slurm: SlurmCluster, ended: dict[str, str], caplog: pytest.LogCaptureFixture
):
    end_daemon(accounted_slurm.root / "slurmdbd.pid")
    with caplog.at_level(logging.WARNING):
        assert Slurm().find([ended["bad"]]) == {}
    assert "count as lost meanwhile" in caplog.text
    accounted_slurm.start_slurmdbd()
    assert Slurm().find([ended["bad"]])[ended["bad"]] == Job(ended["bad"], "FAILED", 3, 0)


def test_job_that_the_controller_has_lost_does_not_run_for_ever(accounted_slurm: SlurmCluster, tmp_path: Path):
    """The controller starts without its memory; the accounts may still have the job as running."""
    folder = tmp_path / "sweep"
    words = ["trainer.max_steps=100000", "adapter.rank=2,4", SETUP, f"sweep_dir={folder}"]
    assert main(["submit", "-m", *TINY, *words]) == 0
    wait_for("a trial to run", SECONDS, lambda: "running" in [trial.state for trial in seen(folder).trials])
    end_daemon(accounted_slurm.root / "slurmctld.pid")
    accounted_slurm.start_slurmctld()
    wait_for("the controller", 60, lambda: accounted_slurm.ask("sinfo", "--noheader"))
    wait_for("that the jobs are gone", 60, lambda: not accounted_slurm.ask("squeue", "--noheader"))
    assert {trial.state for trial in seen(folder).trials} <= {*TO_BE_RETRIED}
