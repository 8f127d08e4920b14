"""How the ranks of a run share the work."""

from dataclasses import dataclass
from enum import Enum

from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy


class StrategyKind(Enum):
    single = "single"
    """One process, one device."""
    ddp = "ddp"
    """Every rank holds the whole model; gradients of the adapters are averaged."""


@dataclass
class StrategyConfig:
    kind: StrategyKind = StrategyKind.single
    """How ranks share the work."""


def build_strategy(config: StrategyConfig, accelerator: str) -> Strategy:
    """The Lightning strategy; `accelerator` is cpu or cuda."""
    if config.kind is StrategyKind.single:
        return SingleDeviceStrategy(device="cuda:0" if accelerator == "cuda" else "cpu")
    # Every rank loads the same base and draws the same adapters from the seed, so nothing is broadcast at the start.
    return DDPStrategy(
        process_group_backend="nccl" if accelerator == "cuda" else "gloo",
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        init_sync=False,
    )
