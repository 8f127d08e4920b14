"""Small models, with and without adapters, for the tests in this folder."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft.adapters.base import Adapter, AdapterConfig, Target
from lightning_peft.adapters.inject import SHARED, adapters, inject_adapters
from lightning_peft.adapters.registry import METHODS
from lightning_peft.quantization.config import Kind, QuantizationConfig
from lightning_peft.quantization.quantize import quantize_linears
from lightning_peft.quantization.weights import linear_shape

WRAPPING = [name for name, method in METHODS.items() if not method.trains_all]
"""Methods that wrap layers of a frozen base."""


def llama(dtype: torch.dtype = torch.float32, quantized: bool | Kind = False, **options: Any) -> LlamaForCausalLM:
    """Return two layers of width 64 with grouped keys, biases on q, k, v and o; equal weights at every call.

    quantized: a kind of codes; True is NF4.
    """
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}
    config = LlamaConfig(**{**sizes, **heads, "tie_word_embeddings": False, **options})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for name, parameter in model.named_parameters():
            nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.1)
    model = model.to(dtype).eval()
    if quantized:
        kind = Kind.nf4 if quantized is True else quantized
        quantize_linears(model, QuantizationConfig(kind=kind, double_quantization=kind is not Kind.int8))
    return model


def config_for(method: str, **options: Any) -> AdapterConfig:
    """Return a config of the method at a size that suits the model above."""
    row = METHODS[method]
    rank = {"rank": 4} if row.config.uses_rank else {}
    return row.config(**{**rank, **row.contract.options, **options})


def wrapped(kind: type[Adapter], base_layer: nn.Module, rank: int = 4, alpha: float = 8.0, **options: Any) -> Any:
    """Return a fresh adapter of one kind around one layer."""
    rows = [row for row in METHODS.values() if kind in row.layers.values()]
    row = min(rows, key=lambda row: row.config.__module__ != kind.__module__)  # no borrower of the layer
    config_class, options = row.config, row.contract.options | options
    sizes = {"rank": rank, "alpha": alpha} if config_class.uses_rank else {}
    if not config_class.uses_alpha:
        sizes.pop("alpha", None)
    sides = linear_shape(base_layer)
    out_features, in_features = sides[::-1] if isinstance(base_layer, nn.Embedding) else sides
    target = Target("block.0.layer", out_features, in_features, rank, alpha, 0)
    layer: Any = kind(base_layer, target, config_class(**sizes, **options))  # type: ignore[call-arg]
    layer.reset_parameters()
    return layer


def reset(model: nn.Module) -> None:
    """Give every adapter fresh initial values, once tensors built on the meta device hold real weights."""
    shared: Any = getattr(model, SHARED, None)
    if shared is not None:
        shared.reset_parameters()
    for _, adapter in adapters(model):
        adapter.reset_parameters()


def adapted(
    method: str,
    dtype: torch.dtype = torch.float32,
    quantized: bool | Kind = False,
    has_biases: bool = True,
    **options: Any,
) -> nn.Module:
    """Return the model with fresh adapters."""
    model = llama(dtype, quantized, attention_bias=has_biases)
    torch.manual_seed(1)
    inject_adapters(model, config_for(method, **options))
    return model


@torch.no_grad()
def perturb(model: nn.Module, scale: float = 0.05) -> nn.Module:
    """Move every trainable parameter, as training would."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def tokens(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(0, 128, (batch, length), generator=torch.Generator().manual_seed(3))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(tokens(), use_cache=False).logits


def is_base_but_for_rounding(fresh: Tensor, base: nn.Module) -> bool:
    """Return whether logits are about as far from those of `base` in fp32 as its own in bf16 are."""
    own, exact = logits(base), logits(base.float())
    return bool((fresh - exact).norm() < 1.5 * (own - exact).norm())
