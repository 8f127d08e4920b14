"""Private members of Lightning, torch and Hydra that the package leans on, one function each.

The functions were checked with lightning 2.6.6, torch 2.11 and 2.13, hydra-core 1.3.2. Another version is tried here
first: `tests/test_compat.py` calls every function, and holds that nobody else uses what they hide.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hydra.core.config_loader import ConfigLoader
    from hydra.core.config_search_path import ConfigSearchPath
    from lightning.pytorch import Trainer
    from torch import Tensor, nn
    from torch.distributed import Store
    from torch.optim import Optimizer


def is_accumulating(trainer: "Trainer") -> bool:
    """Return whether the batch that ends leaves gradients for the next one: no optimiser step follows it."""
    return trainer.fit_loop._should_accumulate()


def validation_follows(trainer: "Trainer") -> bool:
    """Return whether Lightning validates after the training batch that ends."""
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def leave_signals_alone(trainer: "Trainer") -> None:
    """Take Lightning's signal handlers out: they save and broadcast inside the handler, wherever the step is."""
    from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

    class NoHandlers(_SignalConnector):
        def register_signal_handlers(self) -> None:
            """Register nothing."""

    trainer._signal_connector = NoHandlers(trainer)


def clip_unscaled_gradients(optimizer: "Optimizer") -> None:
    """Have an AMP scaler unscale gradients before they are clipped: a fused optimiser would take them as they are."""
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]


def ignore_in_ddp(module: "nn.Module", names: Sequence[str]) -> None:
    """Keep DDP from sending and checking these parameters and buffers of the module it wraps."""
    from torch.nn.parallel import DistributedDataParallel

    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)


@contextmanager
def fsdp_parameters_made_by(make: Callable[..., "nn.Parameter"]) -> Iterator[None]:
    """Have `fully_shard` inside, and only it, make its parameters with `make(data, requires_grad)`."""
    from torch import nn
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    name: Any = _fsdp_param  # the one module that is to see another Parameter
    name.nn = SimpleNamespace(Parameter=make, Module=nn.Module)
    try:
        yield
    finally:
        name.nn = nn


def give_slices(module: "nn.Module", rows: "Mapping[nn.Parameter, Tensor]") -> None:
    """Have FSDP send the rows given for parameters below a sharded module, in place of padded copies of its own.

    The rows have the storage of what the parameter holds, and are as many as the first rank's.
    """
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        group = part._get_fsdp_state()._fsdp_param_group if isinstance(part, FSDPModule) else None
        for held in () if group is None else group.fsdp_params:
            place = held._module_info
            if (own := rows.get(getattr(place.module, place.param_name))) is not None:
                held._sharded_param_data = own.view(-1)


def store_of_ranks() -> "Store":
    """Return the store in which the ranks of the process group have met."""
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def entered_collectives() -> dict[str, int]:
    """Return by the names of groups how many of their collectives this process has entered, also of one that waits."""
    from torch.distributed.distributed_c10d import _world

    found: dict[str, int] = {}
    for group, name in list(_world.pg_names.items()):
        backends: set[Any] = {group._get_backend(device) for device in group._device_types}
        found[name] = sum(backend._get_sequence_number_for_group() for backend in backends)
    return found


def config_loader_of(path: "ConfigSearchPath") -> "ConfigLoader":
    """Return Hydra's reader of the option files in a search path."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    return ConfigLoaderImpl(path)


def set_up_compiler(graphs: int, on_cuda: bool) -> None:
    """Let torch.compile make so many graphs of one function, whole under DDP, and keep little for the backward pass.

    DDP's own pass cuts a graph wherever its adapters pass a bucket of 1 MiB, and torch 2.11 loses the policy of
    selective checkpointing there; adapters are small, and nothing is won by sending them earlier. On CUDA a compiled
    block would keep a quarter more than the same block not compiled, which is what is estimated.
    """
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch

    dynamo.recompile_limit = max(dynamo.recompile_limit, graphs)
    dynamo.optimize_ddp = False
    if on_cuda:
        functorch.ban_recompute_materialized_backward = False


def let_length_vary(tensor: "Tensor") -> None:
    """Have torch.compile make code for a first dimension of any length, not of the length that it meets first."""
    import torch._dynamo

    torch._dynamo.maybe_mark_dynamic(tensor, 0)
