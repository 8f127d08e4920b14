"""Record where a training loop makes the host wait for a tensor.

On a CUDA device each of these waits for all the work that is queued; on a CPU, where the tests run, nothing waits and
the calls are the same. Work inside an operator of our own is not seen.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
WAITING_OPERATORS = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2, aten.unique_consecutive,
    aten.unique_dim, aten.bincount, aten.is_nonzero,
}  # fmt: skip
"""`item`, `float`, `int` and `bool` of a tensor are the first; the shapes of most others depend on values."""
WAITING_METHODS = {"tolist", "numpy", "cpu", "__array__"}
"""No operator is behind these on a CPU."""

ON_THE_HOST = "lightning_peft/data/"
"""Batches are made in host memory, on a CUDA device as well."""


class PythonCalls(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in WAITING_METHODS:
            HostSyncs.record(func.__name__)
        return func(*args, **(kwargs or {}))


def makes_the_host_wait(func: Any, args: Any) -> bool:
    """Return whether an operator's result, or its shape, is read off values on the device."""
    by_mask = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and any(
        isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
    )
    return func.overloadpacket in WAITING_OPERATORS or by_mask


class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if makes_the_host_wait(func, args):
            HostSyncs.record(str(func))
        return func(*args, **(kwargs or {}))


def is_watched(trainer: Trainer) -> bool:
    """Return whether a step is watched: not the first, which ends in a line of progress, nor the last."""
    return 0 < trainer.global_step < trainer.max_steps - 1


@contextmanager
def watched_synchronisation(record: Callable[[str], None]) -> Iterator[None]:
    """Record a wait that is no operator, and that CUDA's own debug mode does not see either, inside the block."""
    places = [(torch.cuda, "synchronize"), (torch.cuda.Event, "synchronize"), (torch.cuda.Stream, "synchronize")]
    originals = [(owner, name, getattr(owner, name)) for owner, name in places]

    def watched(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            record(name)
            return original(*args, **kwargs)

        return call

    for owner, name, original in originals:
        setattr(owner, name, watched(f"{owner.__name__}.{name}", original))
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


class HostSyncs(Callback):
    """`found` has a stack for each call that waits."""

    found: list[str] = []
    micro_batches = 0

    def __init__(self) -> None:
        HostSyncs.found, HostSyncs.micro_batches = [], 0
        self.modes = ExitStack()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.modes.close()
        if is_watched(trainer):
            HostSyncs.micro_batches += 1
            self.modes.enter_context(watched_synchronisation(HostSyncs.record))
            self.modes.enter_context(PythonCalls())
            self.modes.enter_context(Operators())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.modes.close()

    @classmethod
    def record(cls, call: str) -> None:
        frames = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_stack()[:-2]]
        if not any(ON_THE_HOST in frame for frame in frames):
            cls.found.append("\n  ".join([call, *frames[-8:]]))


class CudaSyncs(Callback):
    """The device itself raises RuntimeError where the host waits for it."""

    micro_batches = 0

    def __init__(self) -> None:
        CudaSyncs.micro_batches = 0
        self.modes = ExitStack()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.modes.close()
        CudaSyncs.micro_batches += is_watched(trainer)
        if is_watched(trainer):
            self.modes.enter_context(watched_synchronisation(CudaSyncs.refuse))
        torch.cuda.set_sync_debug_mode("error" if is_watched(trainer) else "default")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.modes.close()
        torch.cuda.set_sync_debug_mode("default")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.modes.close()
        torch.cuda.set_sync_debug_mode("default")

    @staticmethod
    def refuse(call: str) -> None:
        raise RuntimeError(f"{call}: the host waits for the device")
