"""Layers that models treat in ways of their own: weights read directly, routers, products of another class."""

import pytest
import torch
from families import small_model
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear

from lightning_peft.adapters.inject import adapters, inject_adapters
from lightning_peft.adapters.lora import LoRAConfig
from lightning_peft.adapters.registry import METHODS
from lightning_peft.checkpoint.peft_format import file_tensors
from lightning_peft.models.forwards import keep_weights_in_evaluation
from lightning_peft.quantization.config import Kind, QuantizationConfig
from lightning_peft.quantization.linear import QuantizedLinear
from lightning_peft.quantization.quantize import dequantized_linear, quantize_linears
from lightning_peft.quantization.weights import acts_as_linear, is_quantized

IDS = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(1))
READ_THEIR_WEIGHTS = ["mamba", "bamba", "falcon_h1", "nemotron_h", "rwkv", "jamba", "gemma3n_text"]


def perturbed(model, method="lora", **options):
    torch.manual_seed(0)
    inject_adapters(model, METHODS[method].config(**({"rank": 4} | options)))
    with torch.no_grad():
        for tensor in file_tensors(model).values():
            tensor.add_(0.05 * torch.randn(tensor.shape))
    return model.eval()


def merged_by_hand(model, family):
    plain = small_model(family)
    with torch.no_grad():
        for name, layer in adapters(model):
            weight = plain.get_submodule(name).weight
            weight.add_(layer.scaling * (layer.lora_B.weight @ layer.lora_A.weight))
    return plain


@pytest.mark.parametrize("family", READ_THEIR_WEIGHTS)
def test_all_linear_adapts_what_reads_its_weights(family):
    """Every layer's change counts, and reaches its gradient, as if its weight were the sum."""
    base = small_model(family)
    keep_weights_in_evaluation(base)  # loading does so
    model = perturbed(base)
    logits = model(input_ids=IDS, use_cache=False).logits
    expected = merged_by_hand(model, family)(input_ids=IDS, use_cache=False).logits.detach()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    logits.square().sum().backward()
    lacking = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert lacking == []


def test_gemma_3n_reaches_every_adapter_in_training():
    """Its mixing layers are clamped in training, and read as weights; HF PEFT gives those no gradient."""
    model = perturbed(small_model("gemma3n_text")).train()
    model(input_ids=IDS, use_cache=False).logits.square().sum().backward()
    lacking = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert lacking == []


@pytest.mark.parametrize("method", ["lora", "dora", "hira", "miss", "adalora"])
def test_weight_of_an_adapter_is_the_merged_one(method):
    more = {"target_rank": 2} if method == "adalora" else {}
    model = perturbed(small_model("gpt2" if method == "lora" else "llama"), method, **more)
    name, layer = next(adapters(model))
    x = torch.randn(3, layer.in_features if method != "lora" else layer.nx)
    weight = layer.weight.t() if method == "lora" else layer.weight
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, layer.bias), rtol=1e-4, atol=1e-5)
    assert layer.weight.requires_grad and layer.weight.shape == layer.base_layer.weight.shape


@pytest.mark.parametrize("family", ["phimoe", "llama4_text", "deepseek_v3"])
def test_routers_that_are_linear_layers_are_left_alone(family):
    model = perturbed(small_model(family))
    assert not any("router" in name for name, _ in adapters(model))
    model(input_ids=IDS, use_cache=False).logits.sum().backward()


def test_a_class_with_the_plain_product_counts_as_linear():
    class Router(nn.Linear):
        def forward(self, x):
            return super().forward(x).topk(2)

    class Sized(nn.Linear):
        def __init__(self, config):
            super().__init__(config.width, config.width)

    assert acts_as_linear(FalconLinear) and acts_as_linear(nn.Linear)
    assert not acts_as_linear(Router) and acts_as_linear(Sized)  # its forward is that of nn.Linear


@pytest.mark.parametrize(("family", "kind"), [("falcon", "FalconLinear"), ("gpt2", "Conv1D")])
def test_layers_of_another_class_are_quantised(family, kind):
    options = {"num_key_value_heads": None} if family == "falcon" else {}
    model, plain = small_model(family, **options), small_model(family, **options)
    names = quantize_linears(model, QuantizationConfig(Kind.nf4, block_size=32))
    assert len(names) == 8 and all(type(plain.get_submodule(name)).__name__ == kind for name in names)
    logits = perturbed(model)(input_ids=IDS).logits
    for name in names:
        coded = model.get_submodule(name).base_layer
        dense = dequantized_linear(coded)
        assert dense.weight.shape == plain.get_submodule(name).weight.shape
        plain.set_submodule(name, dense)
    with torch.no_grad():
        for name, layer in adapters(model):
            change = layer.delta_weight()
            plain.get_submodule(name).weight.add_(change.t() if kind == "Conv1D" else change)
    torch.testing.assert_close(logits, plain(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)


def test_layers_whose_weight_is_read_stay_dense():
    model = small_model("mamba")
    names = quantize_linears(model, QuantizationConfig(Kind.nf4, block_size=32))
    assert isinstance(model.get_submodule(names[0]), QuantizedLinear)
    assert not any(is_quantized(m) for n, m in model.named_modules() if n.endswith("dt_proj"))
    assert model(input_ids=IDS, use_cache=False).logits.isfinite().all()


@pytest.mark.parametrize(
    ("family", "module"), [("qwen3_moe", "mlp.gate"), ("gpt_oss", "router"), ("gpt_oss", "self_attn")]
)
def test_modules_that_return_tuples_train_in_bf16(family, module):
    model = small_model(family).to(torch.bfloat16)
    target = ["re:.*layers.0.*v_proj"] if module != "self_attn" else ["lm_head"]
    inject_adapters(model, LoRAConfig(rank=2, target_modules=target, trainable_modules=[module]))
    model(input_ids=IDS, use_cache=False).logits.float().square().sum().backward()
    trained = [p for n, p in model.named_parameters() if p.requires_grad and "lora" not in n]
    assert trained and all(p.dtype == torch.float32 and p.grad is not None for p in trained)
