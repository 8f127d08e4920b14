"""Full fine-tuning: no adapters, every weight trains."""

from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_peft.adapters.base import AdapterConfig
from lightning_peft.adapters.method import Method


@dataclass
class FullConfig(AdapterConfig):
    method: str = "full"
    target_modules: Any = None
    """Always null: there is nothing to select."""
    rank: int | None = None

    uses_rank: ClassVar[bool] = False
    uses_alpha: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("target_modules", "exclude_modules", "layers", "trainable_modules", "init_from"):
            value = getattr(self, option)
            if value:
                raise ValueError(f"adapter.{option}={value!r}: method full trains every weight; leave it out")


METHOD = Method(FullConfig, change="every weight", count="d k")
