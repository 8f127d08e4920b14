"""The table of methods. A new method is one file and one row here."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_peft.adapters.adalora import AdaLoRAConfig, AdaLoRALinear, rank_schedule
from lightning_peft.adapters.base import Adapter, AdapterConfig, StepSchedule
from lightning_peft.adapters.dora import DoRAConfig, DoRAEmbedding, DoRALinear
from lightning_peft.adapters.full import FullConfig
from lightning_peft.adapters.hira import HiRAConfig, HiRALinear
from lightning_peft.adapters.ia3 import IA3Config, IA3Linear
from lightning_peft.adapters.intrinsic import IntrinsicConfig, IntrinsicLinear, IntrinsicVector
from lightning_peft.adapters.lora import LoRAConfig, LoRAEmbedding, LoRALinear
from lightning_peft.adapters.lora_fa import LoRAFAConfig, LoRAFALinear
from lightning_peft.adapters.miss import MiSSConfig, MiSSLinear
from lightning_peft.adapters.vera import SharedProjection, VeRAConfig, VeRALinear
from lightning_peft.quantization.linear import QuantizedLinear


@dataclass(frozen=True)
class Method:
    """A config dataclass and the adapter class for each kind of layer it can wrap; none when nothing is wrapped."""

    config: type[AdapterConfig]
    layers: dict[type[nn.Module], type[Adapter]] = field(default_factory=dict)
    shared: Callable[[Any, Any], nn.Module] | None = None
    """(config, targets) -> state all layers share, handed to each as `shared`; it has `reset_parameters`."""
    schedule: Callable[[Any, Any, int], StepSchedule] | None = None
    """(adapters by name, config, optimiser steps) -> what changes the adapters between steps."""


def linears(adapter: type[Adapter]) -> dict[type[nn.Module], type[Adapter]]:
    """The linear layers there are, all wrapped by one adapter class."""
    return {nn.Linear: adapter, QuantizedLinear: adapter, Conv1D: adapter}


METHODS: dict[str, Method] = {
    "adalora": Method(AdaLoRAConfig, linears(AdaLoRALinear), schedule=rank_schedule),
    "dora": Method(DoRAConfig, {**linears(DoRALinear), nn.Embedding: DoRAEmbedding}),
    "full": Method(FullConfig),
    "hira": Method(HiRAConfig, linears(HiRALinear)),
    "ia3": Method(IA3Config, linears(IA3Linear)),
    "intrinsic": Method(IntrinsicConfig, linears(IntrinsicLinear), shared=IntrinsicVector),
    "lora": Method(LoRAConfig, {**linears(LoRALinear), nn.Embedding: LoRAEmbedding}),
    "lora_fa": Method(LoRAFAConfig, linears(LoRAFALinear)),
    "miss": Method(MiSSConfig, linears(MiSSLinear)),
    "vera": Method(VeRAConfig, linears(VeRALinear), shared=SharedProjection),
}
