"""The processes of a SLURM job that are ranks, and how they find each other, by the variables SLURM sets."""

import pytest

from lightning_peft import distributed
from lightning_peft.runs.machine import Machine
from lightning_peft.runs.trainer_options import count_ranks
from lightning_peft.training.config import StrategyKind

JOB = {"SLURM_JOB_ID": "71", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
SECOND_OF_TWO_NODES = JOB | {
    "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}  # fmt: skip


@pytest.fixture
def environment(monkeypatch):
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(key, "before")  # the variables that rank_environment sets are taken back
        monkeypatch.delenv(key)
    return lambda variables: [monkeypatch.setenv(key, value) for key, value in variables.items()]


@pytest.mark.parametrize(
    ("variables", "ranks"),
    [
        (JOB, 1),  # a batch script
        (JOB | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, 1),  # a shell that salloc opens on a node
        (JOB | {"SLURM_STEP_ID": "4294967291"}, 1),  # a batch script, as some versions have it
        (JOB | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}, 1),  # srun --pty bash
        (JOB | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}, 2),
        (JOB | {"SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": "1", "RANK": "1", "WORLD_SIZE": "4"}, 4),  # torchrun
    ],
)
def test_ranks_are_the_tasks_of_a_step_of_srun(environment, variables, ranks):
    environment(variables)
    assert (distributed.world_size(), distributed.are_ranks_started()) == (ranks, ranks > 1)


def test_tasks_meet_at_the_first_node_of_their_step(environment):
    environment(SECOND_OF_TWO_NODES)
    ranks = distributed.rank_environment()
    assert (ranks.global_rank(), ranks.local_rank(), ranks.node_rank(), ranks.world_size()) == (1, 0, 1, 2)
    assert (ranks.main_address, ranks.main_port) == ("gpu07", 15071)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[03-07,12],cpu1", "gpu03"),
        ("rack1-n[2,5]", "rack1-n2"),
        ("127.0.0.[1-2]", "127.0.0.1"),
    ],
)
def test_first_node_of_a_list(environment, nodes, first):
    environment(SECOND_OF_TWO_NODES | {"SLURM_STEP_NODELIST": nodes})
    assert distributed.slurm_step_for_torchrun()["MASTER_ADDR"] == first


def test_address_and_port_given_stay(environment):
    environment(SECOND_OF_TWO_NODES | {"MASTER_ADDR": "head", "MASTER_PORT": "4711"})
    assert distributed.slurm_step_for_torchrun().items() >= {"MASTER_ADDR": "head", "MASTER_PORT": "4711"}.items()


def test_devices_that_are_not_the_tasks_of_a_node_are_named(environment):
    environment(SECOND_OF_TWO_NODES)
    with pytest.raises(ValueError, match="srun started 1 tasks on a node; set trainer.devices=1 trainer.num_nodes=2"):
        count_ranks({"devices": 2, "num_nodes": 1}, StrategyKind.ddp, Machine.here({"accelerator": "cpu"}))
    assert count_ranks({"devices": 1, "num_nodes": 2}, StrategyKind.ddp, Machine.here({"accelerator": "cpu"})) == (1, 2)
