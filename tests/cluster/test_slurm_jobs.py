"""Trainings submitted to a real SLURM: each leaves when it is told to and ends as one that was never disturbed."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from equal_runs import assert_equal_runs, rows
from slurm_cluster import NODES, wait_for
from tiny_runs import TINY

from lightning_peft.__main__ import main
from lightning_peft.cluster.job import Job
from lightning_peft.cluster.slurm import SLURM_COMMANDS, Slurm

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

HELPERS = Path(__file__).parent.parent / "training"
REPOSITORY = HELPERS.parent.parent
MINUTES = 5
RUN = [
    *TINY, "data.packing=true", "data.max_length=512", "adapter.dropout=0.1", "trainer.max_steps=10",
    "trainer.accumulate_grad_batches=2", "validation.every_n_steps=4", "checkpoint.every_n_steps=25",
    f"cluster.setup=['export OMP_NUM_THREADS=1 PYTHONPATH={REPOSITORY}:{HELPERS}']",
]  # fmt: skip
PAUSED = "+callbacks.pause={_target_: signalling.PauseFirstStart, step: 3, seconds: 120}"


def submit(run_dir: Path, *overrides: str) -> str:
    """Submit a run; return the id of the job."""
    assert main(["submit", *RUN, f"run_dir={run_dir}", *overrides]) == 0
    return json.loads((run_dir / "job.json").read_text())["job_id"]


def job(job_id: str) -> Job:
    return Slurm().find([job_id])[job_id]


def log(run_dir: Path) -> str:
    return "\n".join(path.read_text() for path in run_dir.glob("slurm-*.log"))


def wait_for_end(job_id: str, run_dir: Path) -> Job:
    """Wait until the job neither runs nor waits for a continuation.

    Between the end of a batch script and the requeue that it asked for, SLURM has the job as ended for an instant.
    """

    def has_ended() -> bool:
        if job(job_id).is_active:
            return False
        time.sleep(3)
        return not job(job_id).is_active

    wait_for(f"end of job {job_id}: {log(run_dir)}", MINUTES * 60, has_ended)
    return job(job_id)


def wait_for_step(run_dir: Path, step: int) -> None:
    """Wait until the step is logged, after which a run with PAUSED sits in the next one."""
    path = run_dir / "metrics.csv"
    wait_for(f"step {step} in {run_dir}", MINUTES * 60, lambda: path.exists() and len(rows(run_dir)) >= step)


@pytest.fixture(scope="module")
def undisturbed(slurm, tmp_path_factory):
    """Train a run with a file in its folder that Lightning, unasked, would take for its checkpoint under SLURM."""
    run_dir = tmp_path_factory.mktemp("undisturbed")
    (run_dir / "hpc_ckpt_1.ckpt").write_bytes(b"of another run")
    assert wait_for_end(submit(run_dir), run_dir).state == "COMPLETED", log(run_dir)
    return run_dir


def test_finished_run_is_not_submitted_again(undisturbed, capsys):
    before = json.loads((undisturbed / "job.json").read_text())
    assert submit(undisturbed) == before["job_id"]
    assert json.loads((undisturbed / "result.json").read_text())["status"] == "finished"


def test_signalled_job_is_requeued_and_ends_bit_equal(slurm, tmp_path, undisturbed):
    job_id = submit(tmp_path, PAUSED)
    wait_for_step(tmp_path, 3)
    slurm.run("scancel", "--signal=USR1", job_id)
    ended = wait_for_end(job_id, tmp_path)
    assert (ended.state, ended.restarts) == ("COMPLETED", 1), log(tmp_path)
    assert "SIGUSR1: saved after step 4" in log(tmp_path)
    assert_equal_runs(tmp_path, undisturbed)


def test_requeued_job_ends_bit_equal(slurm, tmp_path, undisturbed):
    job_id = submit(tmp_path, PAUSED)
    wait_for_step(tmp_path, 3)
    SLURM_COMMANDS.run("scontrol", "requeue", job_id)
    ended = wait_for_end(job_id, tmp_path)
    assert (ended.state, ended.restarts) == ("COMPLETED", 1), log(tmp_path)
    assert "SIGTERM: saved after step 4" in log(tmp_path)
    assert_equal_runs(tmp_path, undisturbed)


def test_job_makes_way_for_a_higher_partition_and_ends_bit_equal(slurm, tmp_path, undisturbed):
    job_id = submit(tmp_path, PAUSED, "cluster.partition=debug", f"cluster.sbatch=[--nodelist {NODES[1]}]")
    wait_for_step(tmp_path, 3)
    urgent = slurm.run(
        "sbatch", "--parsable", "--partition=high", "--exclusive", f"--nodelist={NODES[1]}", "--wrap=sleep 3",
        "--output=/dev/null",
    ).strip()  # fmt: skip
    assert wait_for_end(urgent, tmp_path).state == "COMPLETED"
    ended = wait_for_end(job_id, tmp_path)
    assert (ended.state, ended.restarts) == ("COMPLETED", 1), log(tmp_path)
    assert "SIGTERM: saved after step 4" in log(tmp_path)
    assert_equal_runs(tmp_path, undisturbed)


def test_job_continues_after_its_time_limit(slurm, tmp_path, undisturbed):
    job_id = submit(tmp_path, PAUSED.replace("120", "200"), "cluster.time=3", "cluster.grace=60")
    ended = wait_for_end(job_id, tmp_path)
    assert (ended.state, ended.restarts) == ("COMPLETED", 1), log(tmp_path)
    assert "SIGUSR1: saved after step 4" in log(tmp_path)
    assert_equal_runs(tmp_path, undisturbed)


def test_crashed_job_is_failed(slurm, tmp_path):
    job_id = submit(tmp_path, "+callbacks.error={_target_: signalling.FailAt, micro_batch: 2}")
    ended = wait_for_end(job_id, tmp_path)
    assert (ended.state, ended.exit_code, ended.restarts) == ("FAILED", 1, 0), log(tmp_path)


def test_cancelled_job_stays_cancelled(slurm, tmp_path, capsys):
    job_id = submit(tmp_path, PAUSED)
    wait_for_step(tmp_path, 3)
    capsys.readouterr()
    assert main(["submit", *RUN, f"run_dir={tmp_path}"]) == 2
    assert f"job {job_id} runs it" in capsys.readouterr().err
    Slurm().cancel([job_id])
    ended = wait_for_end(job_id, tmp_path)
    assert (ended.state, ended.restarts) == ("CANCELLED", 0), log(tmp_path)


def test_any_folder_runs_with_the_environment_of_the_script(slurm, tmp_path):
    run_dir = tmp_path / "my run 50%"
    two_ranks = ["strategy=ddp", "cluster.tasks_per_node=2", "cluster.sbatch=['--export=NONE']", "trainer.max_steps=2"]
    # It is found by the PYTHONPATH of cluster.setup alone.
    job_id = submit(run_dir, *two_ranks, "callbacks.none={_target_: signalling.FailAt, micro_batch: 999}")
    assert wait_for_end(job_id, run_dir).state == "COMPLETED", log(run_dir)


def test_script_runs_in_its_folder_wherever_it_is_submitted_from(slurm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "run"
    assert wait_for_end(submit(Path("run"), "trainer.max_steps=2"), run_dir).state == "COMPLETED", log(run_dir)
    (run_dir / "result.json").unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = slurm.run("sbatch", "--parsable", str(run_dir / "job.sbatch")).strip()
    assert wait_for_end(again, run_dir).state == "COMPLETED", log(run_dir)
    assert json.loads((run_dir / "result.json").read_text())["status"] == "finished"
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_refused_job_is_one_line_and_leaves_nothing(slurm, tmp_path, capsys):
    for words in (["submit"], ["submit", "-m", "adapter.rank=2,4"]):
        assert main([*words, *RUN, f"run_dir={tmp_path}/a/run", "cluster.partition=nope"]) == 2
        assert "invalid partition specified: nope" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []


def test_job_that_never_gets_to_a_checkpoint_fails(slurm, tmp_path):
    slow = "callbacks.slow={_target_: signalling.SlowStart, seconds: 70}"
    job_id = submit(tmp_path, slow, "cluster.time=1", "cluster.grace=50")
    ended = wait_for_end(job_id, tmp_path)
    assert (ended.state, ended.restarts) == ("FAILED", 2), log(tmp_path)
    assert "three starts in a row had to leave before a checkpoint" in log(tmp_path)


def test_ranks_are_found_without_tasks_per_node(slurm, tmp_path):
    train = " ".join(f"'{word}'" for word in [*TINY, "strategy=ddp", "trainer.devices=2", "trainer.max_steps=2"])
    command = f"export OMP_NUM_THREADS=1; srun {sys.executable} -m lightning_peft train {train} run_dir={tmp_path}/run"
    options = ["--ntasks=2", "--nodes=1", f"--chdir={REPOSITORY}", f"--output={tmp_path}/slurm-1.log"]
    job_id = slurm.run("sbatch", "--parsable", *options, f"--wrap={command}").strip()
    assert wait_for_end(job_id, tmp_path).state == "COMPLETED", log(tmp_path)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 2


def test_forgotten_job_is_absent(slurm):
    assert Slurm().find(["1"]) == {}


def test_command_that_slurm_refuses_says_why(slurm):
    with pytest.raises(RuntimeError, match="Invalid job id"):
        SLURM_COMMANDS.run("scontrol", "requeue", "1")


def test_array_states_are_told_apart(slurm, tmp_path):
    script = tmp_path / "array.sbatch"
    script.write_text("#!/bin/bash\nexit $SLURM_ARRAY_TASK_ID\n")
    array = subprocess.run(
        ["sbatch", "--parsable", "--array=0-3%1", f"--output={tmp_path}/%a.log", str(script)],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    assert set(Slurm().find([array])) == {f"{array}_{task}" for task in range(4)}
    wait_for("end of the array", 60, lambda: not any(one.is_active for one in Slurm().find([array]).values()))
    ends = {one.id: (one.state, one.exit_code) for one in Slurm().find([array]).values()}
    assert ends == {f"{array}_{task}": ("FAILED" if task else "COMPLETED", task) for task in range(4)}


def test_two_nodes_leave_together_and_end_bit_equal(slurm, tmp_path):
    """Only one of the two ranks is signalled; both agree on the step."""
    two_nodes = ["strategy=ddp", "cluster.nodes=2", "cluster.tasks_per_node=1"]
    alone, signalled = tmp_path / "alone", tmp_path / "signalled"
    undisturbed_id, job_id = submit(alone, *two_nodes), submit(signalled, *two_nodes, PAUSED)
    wait_for_step(signalled, 3)
    slurm.run("scancel", "--signal=USR1", job_id)
    ended = wait_for_end(job_id, signalled)
    assert (ended.state, ended.restarts) == ("COMPLETED", 1), log(signalled)
    assert "SIGUSR1: saved after step 4" in log(signalled)
    assert wait_for_end(undisturbed_id, alone).state == "COMPLETED", log(alone)
    assert_equal_runs(signalled, alone)
