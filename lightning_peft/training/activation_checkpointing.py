"""Trading a second forward pass for activation memory, block by block."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from lightning_peft.models import attention  # noqa: F401  registers sample_attention and torch's varlen
from lightning_peft.models.blocks import transformer_blocks
from lightning_peft.training.config import ActivationCheckpointing
from lightning_peft.training.recomputation import recomputing

SAVED_OPERATORS = {
    torch.ops.lightning_peft.sample_attention.default,
    torch.ops.torch_attn._varlen_attn.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def keep_attention(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    # Products are not kept: over a given base an adapter writes its own in place, which a kept output must not see.
    return CheckpointPolicy.MUST_SAVE if operator in SAVED_OPERATORS else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_blocks(model: PreTrainedModel, mode: ActivationCheckpointing) -> None:
    """Switch recomputation on for every block of the model; it acts in training mode only.

    Raises ValueError for auto, which only the commands can decide.
    """
    if mode is ActivationCheckpointing.auto:
        raise ValueError("activation_checkpointing=auto: is chosen by train and estimate; name a mode here")
    if mode is ActivationCheckpointing.none:
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if mode is ActivationCheckpointing.selective:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, keep_attention)
    for block in transformer_blocks(model):
        # It is set on the instance, so that names in the state dict stay what they are.
        block.forward = _checkpointed(block, block.forward, mode, options)  # type: ignore[method-assign]


def _checkpointed(
    block: nn.Module, forward: Callable[..., Any], mode: ActivationCheckpointing, options: dict[str, Any]
) -> Callable[..., Any]:
    elementwise = recomputing(forward)

    def recomputing_forward(*args: Any, **kwargs: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        if mode is ActivationCheckpointing.elementwise:
            return elementwise(*args, **kwargs)
        if mode is ActivationCheckpointing.offload:
            with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
                return checkpoint(forward, *args, **options, **kwargs)
        return checkpoint(forward, *args, **options, **kwargs)

    return recomputing_forward
