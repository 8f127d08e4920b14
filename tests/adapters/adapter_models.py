"""Small models, with and without adapters, for the tests in this folder."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft.adapters.base import AdapterConfig
from lightning_peft.adapters.inject import inject_adapters
from lightning_peft.adapters.registry import METHODS
from lightning_peft.quantization.config import Kind, QuantizationConfig
from lightning_peft.quantization.convert import quantize_linears

WRAPPING = [name for name, method in METHODS.items() if method.layers]
"""Methods that wrap layers: all but full."""


def llama(dtype: torch.dtype = torch.float32, quantized: bool = False, **options: Any) -> LlamaForCausalLM:
    """Two layers of width 64 with grouped keys, biases on q, k, v and o; equal weights at every call."""
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
        quantize_linears(model, QuantizationConfig(kind=Kind.nf4))
    return model


def config_for(method: str, **options: Any) -> AdapterConfig:
    """A config of the method at a size that suits the model above."""
    config = METHODS[method].config
    if config.uses_rank:
        options = {"rank": 4, **options}
    if method == "adalora":
        options = {"target_rank": 2, **options}
    if method == "intrinsic":
        options = {"dimension": 40, **options}
    return config(**options)


def adapted(
    method: str, dtype: torch.dtype = torch.float32, quantized: bool = False, has_biases: bool = True, **options: Any
) -> nn.Module:
    """The model with fresh adapters."""
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
    """Whether logits are about as far from those of `base` in fp32 as its own in bf16 are."""
    own, exact = logits(base), logits(base.float())
    return bool((fresh - exact).norm() < 1.5 * (own - exact).norm())
