"""The ways in which the ranks of a run share the work."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.optim import Optimizer

from lightning_peft.compat import fsdp_parameters_made_by, ignore_in_ddp
from lightning_peft.distributed import TIMEOUT
from lightning_peft.optim.sharded import load_named_state, named_state
from lightning_peft.training.config import StrategyConfig, StrategyKind

logger = logging.getLogger(__name__)


class NamedOptimizerState(Strategy):
    """Saves the optimiser by the names of its parameters, whole: any strategy and number of ranks can go on from it."""

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return named_state(getattr(optimizer, "_optimizer", optimizer))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            load_named_state(optimizer, state)


class OneDevice(NamedOptimizerState, SingleDeviceStrategy):
    """One process on one device."""


class ReplicatedModel(NamedOptimizerState, DDPStrategy):
    """DDP that neither sends nor checks the frozen weights: every rank has read them itself."""

    def setup(self, trainer: Trainer) -> None:
        assert self.model is not None
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        every = [
            *self.model.named_parameters(remove_duplicate=False),
            *self.model.named_buffers(remove_duplicate=False),
        ]
        frozen = [name for name, _ in every if name not in trained]
        ignore_in_ddp(self.model, frozen)
        super().setup(trainer)


@contextmanager
def sharding_codes() -> Iterator[None]:
    """Let `fully_shard` take 4-bit codes: before torch 2.13 it asks bytes for a gradient, if only for a moment."""
    if torch.__version__ >= "2.13":
        yield
        return

    def parameter(data: torch.Tensor, requires_grad: bool = True) -> nn.Parameter:
        return nn.Parameter(data, requires_grad and data.is_floating_point())

    with fsdp_parameters_made_by(parameter):
        yield


def shard_block(block: nn.Module, mesh: DeviceMesh, offload: OffloadPolicy) -> None:
    """Keep this rank's slice of a transformer block; its forward gathers it."""
    with sharding_codes():
        fully_shard(block, mesh=mesh, offload_policy=offload)


def shard_root(root: nn.Module, mesh: DeviceMesh, offload: OffloadPolicy) -> FSDPModule:
    """Shard the rest of `root`, which holds the model, as one group, once every block is sharded.

    The rest are the embeddings, the last norm and the head, tied or not. They stay gathered between the forward and the
    backward pass: the loss reads the head in both.
    """
    with sharding_codes():
        return fully_shard(root, mesh=mesh, reshard_after_forward=False, offload_policy=offload)


class ShardedModel(NamedOptimizerState, ModelParallelStrategy):
    """FSDP2 with whole checkpoints through the Trainer's CheckpointIO; `configure_model` loads and shards.

    `offload` says where the slices wait; bitsandbytes and AdamW then step on the host.
    """

    def __init__(self, ranks: int, offload: OffloadPolicy | None = None):
        self.offload = offload or OffloadPolicy()
        super().__init__(
            data_parallel_size=ranks, tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=TIMEOUT
        )

    @property
    def mesh(self) -> DeviceMesh:
        """Return the ranks over which weights are cut."""
        return self.device_mesh["data_parallel"]

    def shard_block(self, block: nn.Module) -> None:
        """Keep this rank's slice of a transformer block that holds its weights."""
        shard_block(block, self.mesh, self.offload)

    def shard_root(self, root: nn.Module) -> None:
        """Keep this rank's slice of the rest of `root`, as `shard_root` does."""
        self.root = shard_root(root, self.mesh, self.offload)

    @contextmanager
    def root_gathered(self) -> Iterator[None]:
        """Let the model's own forward work inside: blocks gather themselves, as the root always does."""
        self.root.unshard()
        try:
            yield
        finally:
            self.root.reshard()

    def model_to_device(self) -> None:
        """Do nothing: `configure_model` put every slice where it belongs."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return Strategy.lightning_module_state_dict(self)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        Strategy.load_model_state_dict(self, checkpoint, strict)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, Path(checkpoint_path), weights_only)


def build_strategy(config: StrategyConfig, accelerator: str, ranks: int) -> Strategy:
    """Return the Lightning strategy for so many ranks; `accelerator` is cpu or cuda."""
    if config.kind is StrategyKind.fsdp:
        if config.cpu_offload and accelerator == "cpu":
            logger.info("strategy.cpu_offload=true: this run computes in host memory, so nothing moves")
        return ShardedModel(ranks, CPUOffloadPolicy(pin_memory=accelerator == "cuda") if config.cpu_offload else None)
    if config.kind is StrategyKind.ddp:
        return ReplicatedModel(gradient_as_bucket_view=True, timeout=TIMEOUT)
    return OneDevice(device="cuda:0" if accelerator == "cuda" else "cpu")
