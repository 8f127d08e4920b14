"""The contract of every adapter method, on dense and on 4-bit bases, in fp32 and in bf16."""

import copy

import pytest
import torch
import torch.nn.functional as F
from adapter_models import (
    WRAPPING,
    adapted,
    config_for,
    is_base_but_for_rounding,
    llama,
    logits,
    perturb,
    reset,
    tokens,
)
from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter
from lightning_peft.adapters.inject import (
    adapters,
    disable_adapters,
    inject_adapters,
    trainable_parameter_counts,
)
from lightning_peft.adapters.merge import merge_adapters
from lightning_peft.adapters.registry import METHODS
from lightning_peft.adapters.targets import find_targets
from lightning_peft.kernels.frozen_linear import given
from lightning_peft.quantization.frozen_base import frozen_base
from lightning_peft.quantization.linear import QuantizedLinear
from lightning_peft.quantization.weights import dense_weight, is_quantized

DTYPES = [torch.float32, torch.bfloat16]
every_method = pytest.mark.parametrize("method", WRAPPING)
every_base = pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])

SHAPES = [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)] * 2
"""(out, in) of the linear layers of the model."""


@every_dtype
@every_base
@every_method
def test_fresh_adapters_change_nothing(method: str, quantized: bool, dtype: torch.dtype) -> None:
    base = llama(dtype, quantized, attention_bias=False)
    assert torch.equal(logits(adapted(method, dtype, quantized, has_biases=False)), logits(base))
    fresh, base = logits(adapted(method, dtype, quantized)), llama(dtype, quantized)
    # In bf16 a bias comes after the adapter's product, and so after a rounding.
    assert torch.equal(fresh, logits(base)) or dtype == torch.bfloat16 and is_base_but_for_rounding(fresh, base)


@every_base
@every_method
def test_only_declared_parameters_train(method: str, quantized: bool) -> None:
    model = adapted(method, torch.bfloat16, quantized).train()

    model(tokens(), use_cache=False).logits.float().square().mean().backward()

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    declared = set(METHODS[method].trained)
    ends = {end for name in trained for end in declared if name.endswith(end)}
    assert ends == declared
    assert all(any(name.endswith(end) for end in ends) for name in trained)
    assert all(p.dtype == torch.float32 for p in trained.values())
    assert [name for name, p in model.named_parameters() if (p.grad is not None) != p.requires_grad] == []


@every_base
@every_method
def test_parameter_count_is_the_formula(method: str, quantized: bool) -> None:
    trainable, total = trainable_parameter_counts(adapted(method, quantized=quantized))

    row, config = METHODS[method], config_for(method)
    targets = find_targets(llama(), config, tuple(row.layers))
    if config.target_modules == "all_linear":
        assert [(t.out_features, t.in_features) for t in targets] == SHAPES
    expected = sum(map(row.contract.trained, targets)) + row.contract.shared(config)
    assert trainable == expected
    assert total == sum(p.numel() for p in llama().parameters()) + expected + sum(map(row.contract.frozen, targets))


@every_base
@every_method
def test_merge_equals_adapted_forward(method: str, quantized: bool) -> None:
    model = perturb(adapted(method, quantized=quantized))
    names = [name for name, _ in adapters(model)]
    expected = logits(model)

    merge_adapters(model)

    assert not list(adapters(model)) and not any(is_quantized(model.get_submodule(name)) for name in names)
    # fp32, and sums in another order.
    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(expected, logits(llama(quantized=quantized)), atol=1e-2)


@every_base
@every_method
def test_merge_in_bf16_rounds_the_fp32_sum_once(method: str, quantized: bool) -> None:
    model = perturb(adapted(method, torch.bfloat16, quantized))
    expected = {
        name: (dense_weight(layer.base_layer).float() + layer.delta_weight()).bfloat16()
        for name, layer in adapters(model)
    }

    merge_adapters(model)

    for name, weight in expected.items():
        assert torch.equal(dense_weight(model.get_submodule(name)), weight)


@every_dtype
@every_base
@every_method
def test_disabled_adapters_are_the_base(method: str, quantized: bool, dtype: torch.dtype) -> None:
    model = perturb(adapted(method, dtype, quantized))
    changed = logits(model)

    with disable_adapters(model):
        inside = logits(model)

    assert torch.equal(inside, logits(llama(dtype, quantized)))
    assert torch.equal(logits(model), changed) and not torch.equal(changed, inside)


@every_base
@every_method
def test_state_round_trip(method: str, quantized: bool) -> None:
    model = perturb(adapted(method, torch.bfloat16, quantized))
    base_names = llama(torch.bfloat16, quantized).state_dict().keys()
    state = {
        name: tensor for name, tensor in model.state_dict().items() if name.replace(".base_layer", "") not in base_names
    }
    fresh = adapted(method, torch.bfloat16, quantized)

    missing, unexpected = fresh.load_state_dict(state, strict=False)

    assert not unexpected and all(name.replace(".base_layer", "") in base_names for name in missing)
    assert torch.equal(logits(fresh), logits(model))


@every_base
@every_method
def test_gradients_equal_those_of_the_dense_formula(method: str, quantized: bool) -> None:
    model = perturb(adapted(method, quantized=quantized))
    shared = list(getattr(model, "adapter_shared", nn.Module()).parameters())
    for name in ("model.layers.1.self_attn.k_proj", "model.layers.0.mlp.down_proj"):
        layer = model.get_submodule(name)
        if not isinstance(layer, Adapter):
            continue
        weight = dense_weight(layer.base_layer).float()
        bias = layer.base_layer.bias
        x = torch.randn(3, 5, weight.shape[1], requires_grad=True)
        wanted = [x, *(p for p in [*layer.parameters(), *shared] if p.requires_grad)]
        direction = torch.randn(3, 5, weight.shape[0])

        delta_bias = layer.delta_bias()
        dense_bias = bias if delta_bias is None else bias + delta_bias
        dense = F.linear(x, weight + layer.delta_weight(), dense_bias)
        expected = torch.autograd.grad((dense * direction).sum(), wanted, allow_unused=True)
        actual = torch.autograd.grad((layer(x) * direction).sum(), wanted, allow_unused=True)

        # fp32 sums of up to 128 products in another order.
        torch.testing.assert_close(layer(x), dense, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3)


@every_method
def test_meta_model_is_real_after_reset(method: str) -> None:
    real = llama()
    with torch.device("meta"):
        model = type(real)(real.config)
    inject_adapters(model, config_for(method))
    assert all(p.is_meta for p in model.parameters())

    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    model.model.rotary_emb = copy.deepcopy(real.model.rotary_emb)
    names = {name.replace(".base_layer", ""): name for name in model.state_dict()}
    model.load_state_dict({names[name]: tensor for name, tensor in real.state_dict().items()}, strict=False)
    reset(model)

    assert torch.equal(logits(model.eval()), logits(real))
    perturb(model)
    reference = adapted(method)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(model.get_parameter(name))
    assert torch.equal(logits(model), logits(reference))


@every_base
@every_method
def test_several_adapters_share_one_base_output(method: str, quantized: bool) -> None:
    first, second = (perturb(adapted(method, quantized=quantized), scale) for scale in (0.05, 0.02))
    name = "model.layers.1.self_attn.v_proj"
    layers = [model.get_submodule(name) for model in (first, second)]
    x = torch.randn(2, 3, 64)

    base_output = layers[0].base_layer(x)
    together = [layer.adapted_output(x, base_output.clone()) for layer in layers]

    for layer, output in zip(layers, together, strict=True):
        assert torch.equal(output, layer(x))
    assert not torch.equal(*together)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("form", ["run inside", "run before"])
@every_base
@every_method
def test_fused_step_is_the_formula(method: str, quantized: bool, form: str, dropout: float) -> None:
    """A kernel computes what `adapt` says, gradients included, in fp64 (torch's own tolerances, 1e-7)."""
    options = {"dropout": dropout} if hasattr(config_for(method), "dropout") else {}
    model = perturb(adapted(method, quantized=quantized, **options)).double().train()
    layer = model.get_submodule("model.layers.1.self_attn.v_proj")
    layer.base_layer.bias.requires_grad_(True)
    x = torch.randn(2, 3, 64, dtype=torch.float64, requires_grad=True)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]

    def kernel() -> Tensor | None:
        run_inside = frozen_base(layer.base_layer, x)
        assert run_inside is not None
        return layer.fused(x, run_inside if form == "run inside" else given(layer.base_layer(x)))

    torch.manual_seed(5)
    fused = kernel()
    if fused is None:
        has_kernel = type(layer).fused is not Adapter.fused or type(layer).is_product()
        assert not has_kernel or dropout > 0 or form == "run inside"
        return
    torch.manual_seed(5)
    formula = layer.adapt(x, layer.base_layer(x))
    torch.testing.assert_close(fused, formula)
    gradients = (torch.autograd.grad(y.square().sum(), wanted, allow_unused=True) for y in (fused, formula))
    torch.testing.assert_close(*gradients)


@every_base
@every_method
def test_bf16_gradients_are_those_of_fp32_but_for_rounding(method: str, quantized: bool) -> None:
    """The same layer and input, computed in bf16 and in fp32: gradients differ by bf16's 2^-8 a value."""
    model = perturb(adapted(method, torch.bfloat16, quantized))
    shared = list(getattr(model, "adapter_shared", nn.Module()).parameters())
    for name in ("model.layers.1.self_attn.k_proj", "model.layers.0.mlp.down_proj"):
        layer = model.get_submodule(name)
        if not isinstance(layer, Adapter):
            continue
        weight = dense_weight(layer.base_layer).float()
        bias = None if layer.base_layer.bias is None else layer.base_layer.bias.float()
        x = torch.randn(3, 5, weight.shape[1]).bfloat16().requires_grad_()
        direction = torch.randn(3, 5, weight.shape[0]).bfloat16()
        wanted = [x, *(p for p in [*layer.parameters(), *shared] if p.requires_grad)]

        delta_bias = layer.delta_bias()
        dense_bias = bias if delta_bias is None else bias + delta_bias
        dense = F.linear(x.float(), weight + layer.delta_weight(), dense_bias)
        expected = torch.autograd.grad((dense * direction.float()).sum(), wanted, allow_unused=True)
        actual = torch.autograd.grad((layer(x) * direction).sum(), wanted, allow_unused=True)

        for left, right in zip(actual, expected, strict=True):
            if right is not None:
                assert (left.float() - right.float()).norm() <= 2**-6 * right.float().norm()


# PyTorch's own: its compiler instantiates every autograd function it meets.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated.*:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@every_base
@every_method
def test_compiled_layer_gives_the_same_gradients(method: str, quantized: bool, backend: str) -> None:
    model = perturb(adapted(method, quantized=quantized))
    layer = model.get_submodule("model.layers.0.self_attn.v_proj")
    x = torch.randn(2, 3, 64, requires_grad=True)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    expected = torch.autograd.grad(layer(x).square().sum(), wanted, allow_unused=True)

    torch.compiler.reset()
    compiled = torch.compile(layer, backend=backend)

    actual = torch.autograd.grad(compiled(x).square().sum(), wanted, allow_unused=True)
    torch.testing.assert_close(actual, expected)


@every_method
def test_second_injection_is_refused(method: str) -> None:
    model = adapted(method)

    with pytest.raises(RuntimeError, match="has adapters already"):
        inject_adapters(model, config_for(method))


@every_method
def test_second_merge_changes_nothing(method: str) -> None:
    model = merge_adapters(perturb(adapted(method)))
    once = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    merge_adapters(model)

    assert once.keys() == model.state_dict().keys()
    assert all(torch.equal(once[name], tensor) for name, tensor in model.state_dict().items())


@every_method
def test_merge_into_codes_takes_the_nearest(method: str) -> None:
    model = perturb(adapted(method, quantized=True))
    sums = {n: dense_weight(layer.base_layer).float() + layer.delta_weight() for n, layer in adapters(model)}

    merge_adapters(model, requantise=True)

    for name, weight in sums.items():
        assert is_quantized(model.get_submodule(name))
        assert torch.equal(dense_weight(model.get_submodule(name)), QuantizedLinear.from_weight(weight).dequantize())


@every_method
def test_merge_into_the_original_base_adds_to_its_weights(method: str) -> None:
    model, original = perturb(adapted(method, quantized=True)), llama()
    sums = {n: dense_weight(original.get_submodule(n)) + layer.delta_weight() for n, layer in adapters(model)}

    merged = merge_adapters(model, original=original)

    assert merged is original and merged.state_dict().keys() == llama().state_dict().keys()
    assert all(torch.equal(merged.get_submodule(name).weight, weight) for name, weight in sums.items())


@every_base
@every_method
def test_low_rank_sum_is_the_change(method: str, quantized: bool) -> None:
    for _, layer in adapters(perturb(adapted(method, quantized=quantized))):
        if (change := layer.low_rank()) is not None:
            product = change.scaling * (change.B @ change.A)
            torch.testing.assert_close(product, layer.delta_weight(), rtol=1e-5, atol=1e-6)
        else:
            assert method in ("dora", "hira", "ia3", "lr_lora", "miss", "intrinsic")
