"""The rank of this process, and the few things ranks do together."""

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
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
SECONDS_BETWEEN_WORDS = 30.0
"""Time that rank zero works by itself before it tells the others that it goes on."""
WAIT_IS_SAID_AFTER = 20.0
"""Seconds of waiting for the other ranks until the log says so."""

FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""The first of SLURM's numbers that are no steps of `srun`: the batch script, a shell of `salloc`, and the like."""


def is_torchrun_rank() -> bool:
    """Return whether torchrun, or our own launcher, started this process as one of its ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def slurm_tasks() -> int:
    """Return the number of processes that `srun` started together with this one; 1 outside of its steps.

    SLURM_NTASKS says how many the job was given, in a batch script and in a shell on a node as well.
    """
    step = os.environ.get("SLURM_STEP_ID", "")
    if not step.isdigit() or int(step) >= FIRST_SPECIAL_STEP:
        return 1
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", "1")))


def are_ranks_started() -> bool:
    """Return whether torchrun, srun or our own launcher started this process as one of its ranks.

    A single task of srun, as a shell of `srun --pty` is, stands alone: `train` starts ranks from there.
    """
    return is_torchrun_rank() or slurm_tasks() > 1


def rank_environment() -> "ClusterEnvironment":
    """Return where this process learns its rank, in Lightning's terms: from torchrun's variables, SLURM's, or none."""
    # These imports take two seconds, which a command without ranks does not wait for.
    from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment

    if not are_ranks_started():
        return LightningEnvironment()
    if not is_torchrun_rank():
        # Lightning knows SLURM too, but wants --ntasks-per-node, and requeues inside a signal handler.
        os.environ.update(slurm_step_for_torchrun())
    return TorchElasticEnvironment()


def slurm_step_for_torchrun() -> dict[str, str]:
    """Return the variables that torchrun would give this task of `srun`. The place where ranks meet may be preset."""
    # The match is the first of "gpu[03-07,12],cpu1".
    nodes = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_NODELIST", "127.0.0.1"))
    host = re.sub(r"\[(\w+)[^]]*\]", r"\1", nodes).partition(",")[0]
    number = int(os.environ.get("SLURM_JOB_ID", "0")) + int(os.environ["SLURM_STEP_ID"])
    return {
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": str(slurm_tasks()),
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "GROUP_RANK": os.environ["SLURM_NODEID"],
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", host),
        "MASTER_PORT": os.environ.get("MASTER_PORT", str(15000 + number % 10000)),
    }


def slurm_tasks_per_node() -> int | None:
    """Return the step's tasks on each of its nodes; None outside of srun, or where nodes do not have equally many."""
    text = os.environ.get("SLURM_STEP_TASKS_PER_NODE", os.environ.get("SLURM_TASKS_PER_NODE", ""))
    equal = re.fullmatch(r"(\d+)(\(x\d+\))?", text)
    return int(equal[1]) if equal and slurm_tasks() > 1 and not is_torchrun_rank() else None


def rank() -> int:
    """Return this process's number among all ranks; 0 where there is one process. Needs no process group."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) if are_ranks_started() else 0


def world_size() -> int:
    """Return the number of ranks that were started; 1 in a process that stands alone. Needs no process group."""
    return int(os.environ["WORLD_SIZE"]) if is_torchrun_rank() else slurm_tasks()


def is_connected() -> bool:
    """Return whether there are other ranks to talk to."""
    return dist.is_available() and dist.is_initialized()


def connect(accelerator: str) -> bool:
    """Join the process group of the ranks that were started: gloo for the host, NCCL for CUDA devices.

    Return False where this process had joined before: whoever did that leaves it.
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
    number, count = environment.global_rank(), environment.world_size()
    place = f"{environment.main_address}:{environment.main_port}"
    waiting = threading.Timer(WAIT_IS_SAID_AFTER, say_that_it_waits, (number, count, place))
    waiting.daemon = True
    waiting.start()
    try:
        dist.init_process_group(backend, rank=number, world_size=count, timeout=TIMEOUT, device_id=device)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise OSError(f"MASTER_PORT={environment.main_port}: taken on this machine; set another that is free") from None
    finally:
        waiting.cancel()
    return True


def say_that_it_waits(rank: int, count: int, place: str) -> None:
    # Every rank says it by itself, as the log is rank zero's.
    print(f"rank {rank} of {count} waits for the others, who meet at {place}", file=sys.stderr, flush=True)


def disconnect() -> None:
    """Leave the process group once every rank is here."""
    dist.barrier()
    dist.destroy_process_group()


def is_lost_rank(error: BaseException) -> bool:
    """Return whether an exception says that another rank was gone or silent, and so has the reason."""
    while error.__context__ is not None:  # an error of a clean-up without the others hides the first error
        error = error.__context__
    if not isinstance(error, RuntimeError) or world_size() == 1:
        return False
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def on_rank_zero(function: Callable[[], Answer]) -> Answer:
    """Return the function's value, computed on rank zero and sent to all; its error for wrong input likewise."""
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


def on_rank_zero_in_steps(steps: Callable[[], Iterable[object]]) -> None:
    """Go through an iterable on rank zero alone, however long it takes; all raise its error for wrong input.

    The other ranks hear that the work goes on, so that only a single step has to take less than `TIMEOUT`.
    """
    if not is_connected():
        for _ in steps():
            pass
        return
    left = iter(steps()) if dist.get_rank() == 0 else iter(())

    def goes_on() -> bool:
        end = time.monotonic() + SECONDS_BETWEEN_WORDS
        for _ in left:
            if time.monotonic() > end:
                return True
        return False

    while on_rank_zero(goes_on):
        pass


def reduce_sums(sums: Tensor) -> Tensor:
    """Sum element-wise over all ranks, in place."""
    if is_connected():
        dist.all_reduce(sums)
    return sums


def highest(number: int) -> int:
    """Return the highest of the ranks' numbers, by way of the host, so that no device has to be waited for."""
    return highest_of_each([number])[0]


def highest_of_each(numbers: Sequence[int]) -> list[int]:
    """Return the highest of the ranks' first numbers, of their second ones and so on: see `highest`."""
    if not is_connected():
        return list(numbers)
    found = torch.tensor(numbers)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return [int(number) for number in found]


def of_all(own: Sequence[Answer]) -> list[Answer]:
    """Return what the ranks have, in their order. All ranks call it."""
    if not is_connected():
        return list(own)
    found: list[Sequence[Answer]] = [()] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return [each for several in found for each in several]


def worst(value: float) -> float:
    """Return the largest of the ranks' values."""
    if not is_connected():
        return value
    largest = torch.tensor(value, dtype=torch.float64)
    if dist.get_backend() == "nccl":
        largest = largest.cuda()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return float(largest)
