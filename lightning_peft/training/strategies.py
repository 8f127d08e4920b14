"""How the ranks of a run share the work."""

from dataclasses import dataclass
from enum import Enum

from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy


class StrategyKind(Enum):
    single = "single"
    """One process, one device."""


@dataclass
class StrategyConfig:
    kind: StrategyKind = StrategyKind.single
    """How ranks share the work."""


def build_strategy(config: StrategyConfig, accelerator: str) -> Strategy:
    """The Lightning strategy; `accelerator` is cpu or cuda."""
    return SingleDeviceStrategy(device="cuda:0" if accelerator == "cuda" else "cpu")
