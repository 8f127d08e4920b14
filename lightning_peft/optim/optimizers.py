"""The optimisers there are. A new one is a function that builds it and a row in `OPTIMIZERS`."""

import logging
import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from lightning_peft.optim.param_groups import parameter_groups
from lightning_peft.optim.routed_adamw import SCORES, RoutedAdamW
from lightning_peft.optim.sharded import STATE_BLOCK, local_rows

logger = logging.getLogger(__name__)

MIN_8BIT_ELEMENTS = 4096
"""Smaller tensors keep fp32 states in bitsandbytes' 8-bit optimisers: `Optimizer2State(min_8bit_size=4096)`."""
MIN_PAGED_ELEMENTS = 100_000
"""The states of smaller tensors are never paged: `Optimizer8bit.get_state_buffer`."""


@dataclass
class OptimizerConfig:
    """Options of every optimiser; `name` picks which."""

    name: str = "adamw"
    """A key of `OPTIMIZERS`; set by the option file."""
    lr: float = 2e-4
    """Peak learning rate; 2e-4 is QLoRA's for 7B and 13B."""
    weight_decay: float = 0.0
    """Decoupled decay of matrices; biases, norms and magnitude vectors are never decayed."""
    beta1: float = 0.9
    """Decay of the gradient's running mean."""
    beta2: float = 0.999
    """Decay of the squared gradient's running mean."""
    eps: float = 1e-8
    """Number added to the denominator."""
    lora_plus_ratio: float | None = None
    """Learning rate of lora_B over that of lora_A (LoRA+, arXiv:2402.12354); null trains both at `lr`."""

    full_lr: float | None = None
    """Peak learning rate of modules of the base that train in full beside adapters; null trains them at `lr`."""

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise ValueError(f"optimizer.name={self.name}: unknown, choose one of {', '.join(OPTIMIZERS)}")
        for name, value in [("lr", self.lr), ("eps", self.eps)]:
            if not value > 0:
                raise ValueError(f"optimizer.{name}={value}: must be above 0")
        if not self.weight_decay >= 0:
            raise ValueError(f"optimizer.weight_decay={self.weight_decay}: must be at least 0")
        for name, value in [("beta1", self.beta1), ("beta2", self.beta2)]:
            if not 0 <= value < 1:
                raise ValueError(f"optimizer.{name}={value}: must be at least 0 and below 1")
        if self.full_lr is not None and not self.full_lr > 0:
            raise ValueError(f"optimizer.full_lr={self.full_lr}: must be above 0, or null")
        if self.lora_plus_ratio is not None and not self.lora_plus_ratio >= 1:
            raise ValueError(f"optimizer.lora_plus_ratio={self.lora_plus_ratio}: must be at least 1, or null")


@dataclass
class RoutedAdamWConfig(OptimizerConfig):
    name: str = "routed_adamw"
    score: str = "epd"
    """Score by which experts compete: epd, the expected decrease of the loss, or pfn, the norm of Adam's direction."""
    winners: int = 1
    """Experts of a layer that are moved in a step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in SCORES:
            raise ValueError(f"optimizer.score={self.score}: must be one of {', '.join(SCORES)}")
        if self.winners < 1:
            raise ValueError(f"optimizer.winners={self.winners}: must be at least 1")


def _routed_adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> Optimizer:
    assert isinstance(config, RoutedAdamWConfig)
    betas = (config.beta1, config.beta2)
    return RoutedAdamW(groups, config.lr, betas, config.eps, config.score, config.winners)


def _adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> Optimizer:
    return AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def _bitsandbytes_adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> Optimizer:
    # bitsandbytes takes seconds to import and three rows of the table need it.
    from lightning_peft.optim.bitsandbytes_adamw import BitsandbytesAdamW

    choice = OPTIMIZERS[config.name]
    parameters = [parameter for group in groups for parameter in group["params"]]
    is_paged = choice.is_paged and all(parameter.is_cuda for parameter in parameters)
    if is_paged:
        paged, resident = optimizer_state_bytes([parameter.numel() for parameter in parameters], config.name)
        logger.info(
            "optimizer=%s: %.1f MiB of state is paged, %.1f MiB is not (tensors below %s elements never are)",
            config.name, paged / 2**20, resident / 2**20, f"{MIN_PAGED_ELEMENTS:,}",
        )  # fmt: skip
    elif choice.is_paged:
        logger.info("optimizer=%s: there is no paging without CUDA, the states stay in ordinary memory", config.name)
    return BitsandbytesAdamW(
        "adam",  # the decay is decoupled: bitsandbytes' AdamW classes pass the same name
        groups,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        optim_bits=choice.state_bits,
        min_8bit_size=MIN_8BIT_ELEMENTS,
        is_paged=is_paged,
    )


@dataclass(frozen=True)
class OptimizerChoice:
    """A row of `OPTIMIZERS`."""

    build: Callable[[list[dict[str, Any]], OptimizerConfig], Optimizer]
    state_bits: int = 32
    """Bits of each of the two states of a parameter."""
    is_paged: bool = False
    """True where large states live in memory the driver moves between device and host (QLoRA, section 3)."""
    config: type[OptimizerConfig] = OptimizerConfig


OPTIMIZERS: dict[str, OptimizerChoice] = {
    "adamw": OptimizerChoice(_adamw),
    "adamw_8bit": OptimizerChoice(_bitsandbytes_adamw, state_bits=8),
    "routed_adamw": OptimizerChoice(_routed_adamw, config=RoutedAdamWConfig),
    "paged_adamw_32bit": OptimizerChoice(_bitsandbytes_adamw, is_paged=True),
    "paged_adamw_8bit": OptimizerChoice(_bitsandbytes_adamw, state_bits=8, is_paged=True),
}


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig, in_full: Collection[str] = ()
) -> Optimizer:
    """Return the configured optimiser over those of the parameters that train, in named groups (`parameter_groups`).

    `in_full` names those of the base that train beside adapters.

    Sharded parameters are stepped through `local_rows`: call `hand_over_gradients` before each step.
    """
    rows = {name: local_rows(parameter) for name, parameter in named_parameters if parameter.requires_grad}
    apart = {} if config.full_lr is None else {name: row for name, row in rows.items() if name in in_full}
    if config.full_lr is not None and not apart:
        raise ValueError(
            f"optimizer.full_lr={config.full_lr}: no module is trained in full beside adapters; leave it null"
        )
    others = [(name, row) for name, row in rows.items() if name not in apart]
    groups = parameter_groups(others, config.lr, config.weight_decay, config.lora_plus_ratio)
    if config.full_lr is not None:
        own = parameter_groups(apart.items(), config.full_lr, config.weight_decay)
        groups += [group | {"name": f"full_{group['name']}"} for group in own]
    if not groups:
        raise ValueError("no parameter requires gradients: there is nothing to train")
    optimizer = OPTIMIZERS[config.name].build(groups, config)
    names = {parameter: name for name, parameter in rows.items()}
    for group in optimizer.param_groups:
        group["param_names"] = [names[parameter] for parameter in group["params"]]
    if isinstance(optimizer, RoutedAdamW):
        optimizer.take_names()
    return optimizer


def optimizer_state_bytes(sizes: Iterable[int], name: str) -> tuple[int, int]:
    """Return (paged, resident) bytes of state on CUDA for tensors of these numbers of elements."""
    choice = OPTIMIZERS[name]
    paged = resident = 0
    for size in sizes:
        if choice.state_bits == 8 and size >= MIN_8BIT_ELEMENTS:
            states, scales = 2 * size, 2 * 4 * math.ceil(size / STATE_BLOCK)
        else:
            states, scales = 2 * 4 * size, 0
        resident += scales
        if choice.is_paged and size >= MIN_PAGED_ELEMENTS:
            paged += states
        else:
            resident += states
    return paged, resident
