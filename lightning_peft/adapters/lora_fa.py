"""LoRA-FA: LoRA with A frozen, so that no input of an adapted layer is kept (Zhang et al. 2023, arXiv:2308.03303)."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_peft.adapters.lora import LoRAConfig, LoRALinear


@dataclass
class LoRAFAConfig(LoRAConfig):
    method: str = "lora_fa"


class LoRAFALinear(LoRALinear):
    """y = W x + scaling * B A x with A at its random start: B alone trains, and (N, rank) of activations is kept.

    A is part of the adapter all the same and is stored with it.
    """

    def __init__(self, base_layer: nn.Module, *args: Any, **options: Any):
        super().__init__(base_layer, *args, **options)
        self.lora_A.weight.requires_grad_(False)
