"""Compiling what a training step runs most of: the transformer blocks, or the decoder as a whole (torch.compile)."""

import logging
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lightning_peft.models.blocks import transformer_blocks
from lightning_peft.training.activation_checkpointing import ActivationCheckpointing

logger = logging.getLogger(__name__)


class Compilation(Enum):
    auto = "auto"
    """blocks on CUDA, none elsewhere and with activation_checkpointing=offload."""
    none = "none"
    blocks = "blocks"
    """Each transformer block by itself; equal blocks share one compilation."""
    full = "full"
    """The decoder in one piece: compiles longer, fuses across blocks."""


def check_compilation(requested: Compilation, checkpointing: ActivationCheckpointing) -> None:
    """Raises ValueError for what the compiler cannot follow."""
    if checkpointing is ActivationCheckpointing.offload and requested in (Compilation.blocks, Compilation.full):
        raise ValueError(
            f"compile={requested.name} activation_checkpointing=offload: the compiler does not follow the copies to "
            "the host; use compile=none, or activation_checkpointing=blocks"
        )


def resolve_compilation(
    requested: Compilation, accelerator: str, checkpointing: ActivationCheckpointing
) -> Compilation:
    """none, blocks or full, from `compile`; `accelerator` is cpu or cuda."""
    if requested is not Compilation.auto:
        return requested
    can = accelerator == "cuda" and checkpointing is not ActivationCheckpointing.offload
    return Compilation.blocks if can else Compilation.none


def compile_model(model: PreTrainedModel, mode: Compilation, backend: str = "inductor") -> None:
    """Compile the forward and backward pass of training steps; validation and generation run as before.

    Comes after adapters and activation checkpointing, before sharding. Compiling itself happens in the first steps.
    """
    parts: list[nn.Module] = {
        Compilation.none: lambda: [],
        Compilation.blocks: lambda: list(transformer_blocks(model)),
        Compilation.full: lambda: [model.base_model],
    }[mode]()
    for part in parts:
        # On the instance, so that names in the state dict stay what they are.
        part.forward = _compiled_in_training(part, part.forward, backend)  # type: ignore[method-assign]
    if parts:
        logger.info("compile=%s: the first steps take longer", mode.name)


def _compiled_in_training(module: nn.Module, forward: Callable[..., Any], backend: str) -> Callable[..., Any]:
    compiled = torch.compile(forward, backend=backend)

    def training_forward(*args: Any, **kwargs: Any) -> Any:
        # Generation feeds a cache that grows with every token, and validation is too short to be worth a compilation.
        if module.training and torch.is_grad_enabled():
            return compiled(*args, **kwargs)
        return forward(*args, **kwargs)

    return training_forward
