"""Which rank this process is, and the few things ranks do together."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from lightning.fabric.plugins.environments import ClusterEnvironment

Answer = TypeVar("Answer")

LAUNCHER = "LIGHTNING_PEFT_LAUNCHER"
"""Environment variable of a rank with the number of the process that started it, where that is this program."""
TIMEOUT = timedelta(minutes=30)
"""Longest wait of one rank for the others; loading a large model from a slow disk is in it."""


def are_ranks_started() -> bool:
    """Whether torchrun, srun or our own launcher started this process as one of its ranks.

    A batch script has SLURM's variables too, but only srun gives a step id.
    """
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ or "SLURM_STEP_ID" in os.environ


def rank_environment() -> "ClusterEnvironment":
    """How this process learns its rank, in Lightning's terms: torchrun's variables before SLURM's, else alone."""
    # Two seconds that a command without ranks does not wait for.
    from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return TorchElasticEnvironment()
    if "SLURM_STEP_ID" in os.environ:
        # Lightning would save and requeue inside the signal handler, at any point of a step.
        return SLURMEnvironment(auto_requeue=False)
    return LightningEnvironment()


def rank() -> int:
    """This process's number among all ranks; 0 where there is one process. Needs no process group."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) if are_ranks_started() else 0


def world_size() -> int:
    """Ranks that were started; 1 in a process that stands alone. Needs no process group."""
    return int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1"))) if are_ranks_started() else 1


def is_connected() -> bool:
    """Whether there are other ranks to talk to."""
    return dist.is_available() and dist.is_initialized()


def connect(accelerator: str) -> bool:
    """Join the process group of the ranks that were started: gloo for the host, NCCL for CUDA devices.

    False where this process had joined before, and whoever did that leaves it.
    """
    if is_connected():
        return False
    environment = rank_environment()
    os.environ["MASTER_ADDR"] = environment.main_address
    os.environ["MASTER_PORT"] = str(environment.main_port)
    device = None
    if accelerator == "cuda":
        device = torch.device("cuda", environment.local_rank())
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if accelerator == "cuda" else "gloo"
    dist.init_process_group(
        backend, rank=environment.global_rank(), world_size=environment.world_size(), timeout=TIMEOUT, device_id=device
    )
    return True


def disconnect() -> None:
    """Leave the process group once every rank is here."""
    dist.barrier()
    dist.destroy_process_group()


def on_rank_zero(function: Callable[[], Answer]) -> Answer:
    """The function's value, computed on rank zero and sent to all; what it raises for wrong input likewise."""
    if not is_connected():
        return function()
    answer: list[object] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = function()
        except (ValueError, OSError) as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0)
    value, problem = answer
    if isinstance(problem, BaseException):
        raise problem
    return value  # type: ignore[return-value]


def reduce_sums(sums: Tensor) -> Tensor:
    """Element-wise sum over all ranks, in place."""
    if is_connected():
        dist.all_reduce(sums)
    return sums


def highest(number: int) -> int:
    """The highest of the ranks' numbers. Goes by way of the host, so that no device has to be waited for."""
    if not is_connected():
        return number
    found = torch.tensor(number)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def worst(value: float) -> float:
    """The largest of the ranks' values."""
    if not is_connected():
        return value
    largest = torch.tensor(value, dtype=torch.float64)
    if dist.get_backend() == "nccl":
        largest = largest.cuda()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return float(largest)
