"""Compiling what a training step runs most of: the transformer blocks, or the decoder as a whole (torch.compile)."""

import logging
import os
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._triton import has_triton
from transformers import PreTrainedModel

from lightning_peft.compat import let_length_vary, set_up_compiler
from lightning_peft.kernels.inside_product import write_into_wide_rows
from lightning_peft.models.blocks import decoder_of, transformer_blocks
from lightning_peft.training.config import ActivationCheckpointing, Compilation

logger = logging.getLogger(__name__)


def missing_compiler(accelerator: str) -> str | None:
    """Return what torch.compile lacks on this machine for cpu or cuda, or None."""
    variable, names = ("CC", ("cc", "gcc", "clang")) if accelerator == "cuda" else ("CXX", ("g++", "c++", "clang++"))
    if not any(shutil.which(name) for name in (os.environ.get(variable, names[0]), *names)):
        return f"no compiler ({names[0]}, or another in {variable})"
    # Debian's Python has a scheme for what users install, whose folder is not that of its own headers.
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    headers = Path(sysconfig.get_path("include", scheme))
    if not (headers / "Python.h").is_file():
        return f"no Python.h in {headers} (Debian: python3-dev)"
    if accelerator == "cuda" and not has_triton():
        return "no Triton, or a GPU older than it supports"
    return None


def resolve_compilation(
    requested: Compilation, accelerator: str, checkpointing: ActivationCheckpointing
) -> Compilation:
    """Return none, blocks or full, from `compile`; `accelerator` is cpu or cuda.

    Raises ValueError when the machine cannot do what was asked for by name.
    """
    if requested is Compilation.none:
        return requested
    if requested is Compilation.auto and (
        accelerator != "cuda" or checkpointing is ActivationCheckpointing.offload or not torch.cuda.is_available()
    ):
        return Compilation.none
    if (missing := missing_compiler(accelerator)) is None:
        return Compilation.blocks if requested is Compilation.auto else requested
    if requested is Compilation.auto:
        logger.info("compile=none: this machine has %s", missing)
        return Compilation.none
    raise ValueError(f"compile={requested.name}: this machine has {missing}; use compile=none")


def compile_model(model: PreTrainedModel, mode: Compilation, backend: str = "inductor") -> None:
    """Compile the forward and backward pass of training steps; validation and generation run as before.

    It comes after adapters and activation checkpointing, before sharding. Compiling itself happens in the first steps.
    A batch of fewer rows than those before, an epoch's last one, is not worth a compilation and runs as before too.
    """
    parts: list[nn.Module] = {
        Compilation.none: lambda: [],
        Compilation.blocks: lambda: list(transformer_blocks(model)),
        Compilation.full: lambda: [decoder_of(model)],
    }[mode]()
    # Blocks share their code, and ranks that differ by block are compiled each: none may fall back unnoticed.
    set_up_compiler(graphs=len(parts) + 8, on_cuda=torch.cuda.is_available())
    if parts and torch.cuda.is_available():
        write_into_wide_rows()
    rows = CompiledRows()
    for part in parts:
        # It is set on the instance, so that names in the state dict stay what they are.
        part.forward = _compiled_in_training(part, part.forward, backend, rows)  # type: ignore[method-assign]
    if parts:
        logger.info("compile=%s: the first steps take longer", mode.name)


@dataclass
class CompiledRows:
    """The most rows of a batch that were compiled."""

    most: int = 0


def _compiled_in_training(
    module: nn.Module, forward: Callable[..., Any], backend: str, rows: CompiledRows
) -> Callable[..., Any]:
    compiled = torch.compile(forward, backend=backend)

    def training_forward(*args: Any, **kwargs: Any) -> Any:
        # Generation feeds a cache that grows with every token, and validation is too short to be worth a compilation.
        if not (module.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        given = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        if len(given) < rows.most:
            return forward(*args, **kwargs)
        rows.most = len(given)
        if (bounds := kwargs.get("cu_seq_lens_q")) is not None:
            let_length_vary(bounds)
        return compiled(*args, **kwargs)

    return training_forward
