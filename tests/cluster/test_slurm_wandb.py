"""Weights & Biases over a real requeue: one run, every step once, read back from its offline files."""

import pytest
from equal_runs import rows
from test_slurm_jobs import PAUSED, log, submit, wait_for_end, wait_for_step
from wandb_records import offline_runs

from lightning_peft.cluster.slurm import SLURM_COMMANDS
from lightning_peft.tracking.service_record import service_record

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def test_requeued_job_goes_on_in_its_run(slurm, tmp_path):
    job_id = submit(tmp_path, PAUSED, "logger=wandb", "logger.wandb.mode=offline")
    wait_for_step(tmp_path, 3)
    SLURM_COMMANDS.run("scontrol", "requeue", job_id)
    ended = wait_for_end(job_id, tmp_path)
    assert (ended.state, ended.restarts) == ("COMPLETED", 1), log(tmp_path)

    first, second = offline_runs(tmp_path)
    record = service_record(tmp_path, "wandb")
    said = f"{log(tmp_path)}\n{[vars(run) for run in (first, second)]}"
    assert (second.id, second.preempting, second.exit_code) == (record["id"], False, 0), said
    logged = [(int(row["step"]), float(row["loss"])) for row in rows(tmp_path) if row["loss"]]
    assert [step for step, _ in logged] == list(range(1, 11))
    # A service that dies with the ranks says so, and the next start writes what it had not written.
    if "nothing more is logged there" in log(tmp_path):
        assert set(first.scalars("train/loss") + second.scalars("train/loss")) == set(logged), said
    else:
        assert (first.id, first.preempting, first.exit_code) == (record["id"], True, 1), said
        assert (first.scalars("train/loss"), second.scalars("train/loss")) == (logged[:4], logged[4:]), said
