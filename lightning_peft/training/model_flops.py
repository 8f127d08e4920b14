"""The operations of a training step, and the share of a GPU's peak that they use (MFU, Chowdhery et al. 2022)."""

import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_peft.adapters.base import Adapter
from lightning_peft.adapters.targets import experts_of_a_token
from lightning_peft.data.batch import Batch
from lightning_peft.quantization.experts import expert_stacks
from lightning_peft.quantization.weights import is_quantized, weight_shape

PEAK_FLOPS = {
    "GB200": 2500e12, "B200": 2250e12, "H200 NVL": 835e12, "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12,
    "H100": 989e12, "H800": 989e12, "H20": 148e12, "A100": 312e12, "A800": 312e12, "A40": 150e12, "A10G": 70e12,
    "A10": 125e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "RTX 6000 Ada": 364e12, "RTX A6000": 155e12,
    "RTX 5090": 209e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip
"""Dense bf16 peak per second by a part of the device's name, from the vendors' data sheets; the longest part counts."""


LOW_UTILIZATION = 0.2
"""Share of the peak below which a reason is looked for; adapters on one GPU usually reach 0.35 and more. Ours."""
FEW_TOKENS = 2048
"""Tokens of a micro batch below which products are too small for a GPU. Ours."""


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 operations per second of a device by its name; None for one that is not known."""
    parts = [part for part in PEAK_FLOPS if part.lower() in device_name.lower()]
    return PEAK_FLOPS[max(parts, key=len)] if parts else None


def linear_flops_per_token(model: PreTrainedModel) -> float:
    """Return the operations of a token in linear layers, forward and backward.

    Each weight multiplies in the forward pass and for its input's gradient, a trained one for its own gradient too: two
    operations each time. Embeddings look up; of experts those count that a token is sent to.
    """
    experts = expert_stacks(model)
    total = 0.0
    for name, module in model.named_modules():
        if name.removesuffix(".base_layer") in experts or isinstance(module, nn.Embedding):
            continue
        if is_quantized(module):
            total += 4.0 * math.prod(weight_shape(module))
            continue
        if isinstance(module, Adapter):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.ndim == 2:
                total += (6.0 if parameter.requires_grad else 4.0) * parameter.numel()
    if experts:
        share = experts_of_a_token(model)
        total += sum(4.0 * share * stack.out_features * stack.in_features for stack in experts.values())
    return total


def attention_flops(model: PreTrainedModel) -> float:
    """Return the operations of attention over a sample of one token: a sample of T tokens takes T^2 times as many.

    Scores and sums are two products of half a square each, and twice that in the backward pass.
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(heads, int) or not isinstance(layers, int):
        return 0.0
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    return 6.0 * heads * width * sum("attention" in kind and "linear" not in kind for kind in kinds)


def squared_lengths(batch: Batch) -> Tensor:
    """Return the sum of the samples' squared lengths, fp64 scalar on the batch's device."""
    return batch.cu_seqlens.diff().double().square().sum()


def model_flops_utilization(flops: float, seconds: float, devices: int) -> float | None:
    """Return the share of the bf16 peak of so many devices like this one; None where that is not known."""
    peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return None if peak is None else flops / seconds / (peak * devices)


def why_slow(
    utilization: float, micro_batch_tokens: float, precision: str, recomputes: bool, accumulates: bool
) -> str | None:
    """Say why a GPU was used at little of its peak, as far as the options tell; None where it was used well."""
    if utilization >= LOW_UTILIZATION:
        return None
    if "32" in precision:
        reason = f"trainer.precision={precision} computes in fp32: bf16-true takes a fraction of the time"
    elif micro_batch_tokens < FEW_TOKENS:
        reason = (
            f"a micro batch has {micro_batch_tokens:,.0f} tokens, too few to keep it busy: give a larger "
            "data.micro_batch_size" + (", and a smaller trainer.accumulate_grad_batches" if accumulates else "")
        )
    elif recomputes:
        reason = "part of the work is done twice: activation_checkpointing=none where the memory allows it"
    else:
        reason = "the options do not tell why: rows may come too slowly (data.num_workers), or codes take their time"
    return f"the GPU did {utilization:.0%} of what its bf16 peak allows; {reason}"
