"""Weights & Biases over a real requeue: one run, every step once, read back from its offline files."""

import pytest
from equal_runs import rows
from test_slurm_jobs import PAUSED, log, submit, wait_for_end, wait_for_step
from wandb_records import offline_runs

from lightning_peft.cluster.slurm import requeue_job
from lightning_peft.training.wandb_run import wandb_record

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def test_requeued_job_goes_on_in_its_run(slurm, tmp_path):
    job_id = submit(tmp_path, PAUSED, "logger=wandb", "logger.wandb.mode=offline")
    wait_for_step(tmp_path, 3)
    requeue_job(job_id)
    ended = wait_for_end(job_id, tmp_path)
    assert (ended.state, ended.restarts) == ("COMPLETED", 1), log(tmp_path)

    first, second = offline_runs(tmp_path)
    assert first.id == second.id == wandb_record(tmp_path)["id"]
    assert (first.preempting, first.exit_code) == (True, 1) and (second.preempting, second.exit_code) == (False, 0)
    logged = [(int(row["step"]), float(row["loss"])) for row in rows(tmp_path) if row["loss"]]
    assert [step for step, _ in logged] == list(range(1, 11))
    assert (first.scalars("loss"), second.scalars("loss")) == (logged[:4], logged[4:])
