"""The base inside the autograd function of its change: the same numbers as beside it, for every form of base."""

from typing import Any

import pytest
import torch
from adapter_models import adapted, perturb, tokens, wrapped
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from transformers.pytorch_utils import Conv1D

from lightning_peft.adapters.adalora import AdaLoRALinear
from lightning_peft.adapters.dora import DoRALinear
from lightning_peft.adapters.lora import LoRALinear
from lightning_peft.kernels.frozen_linear import DENSE, given
from lightning_peft.kernels.low_rank import add_low_rank
from lightning_peft.quantization.frozen_base import frozen_base
from lightning_peft.quantization.linear import QuantizedLinear
from lightning_peft.training.compilation import missing_compiler

KINDS = [LoRALinear, AdaLoRALinear, DoRALinear]
FORMS = ["dense", "dense with bias", "nf4 with bias", "int8"]


def adapted_layer(kind: type[Any], form: str, dropout: float = 0.0) -> Any:
    """Return a layer 64 -> 24 in fp64 whose adapter changes something; its bias, if it has one, trains."""
    torch.manual_seed(0)
    base: nn.Module = nn.Linear(64, 24, bias="bias" in form, dtype=torch.float64)
    if not form.startswith("dense"):
        base = QuantizedLinear.from_weight(base.weight.data, base.bias, kind=form.split()[0])
    else:
        base.weight.requires_grad_(False)
    layer = wrapped(kind, base, rank=4, alpha=6.8, dropout=dropout).double().train()
    for parameter in layer.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, 1.0, 0.5)
    return layer


def trained(layer: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in layer.named_parameters() if p.requires_grad}


# With dropout DoRA drops the base's input as well, and is not one function.
@pytest.mark.parametrize(
    ("kind", "dropout"), [*((kind, 0.0) for kind in KINDS), (LoRALinear, 0.5), (AdaLoRALinear, 0.5)]
)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_pass_gradcheck(kind: type[Any], form: str, dropout: float) -> None:
    layer = adapted_layer(kind, form, dropout)
    names = list(trained(layer))
    if kind is DoRALinear:  # the norms that its gain has are constants to the gradient
        norms = layer.weight_norms()
        layer.weight_norms = lambda: norms

    def output(x: Tensor, *values: Tensor) -> Tensor:
        torch.manual_seed(1)
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    x = torch.randn(2, 3, 64, dtype=torch.float64, requires_grad=True)
    assert frozen_base(layer.base_layer, x) is not None
    assert torch.autograd.gradcheck(output, (x, *trained(layer).values()))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_low_rank_product_over_a_given_base_passes_gradcheck(dropout: float) -> None:
    torch.manual_seed(0)
    shapes = [(2, 3, 5), (2, 3, 4), (2, 4), (5, 2)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def product(base_output: Tensor, *rest: Tensor) -> Tensor:
        torch.manual_seed(1)
        return add_low_rank(given(base_output.clone()), *rest, 1.7, dropout)

    assert torch.autograd.gradcheck(product, inputs)


@pytest.mark.parametrize("quantized", [False, True])
def test_vera_gives_the_same_over_a_base_run_before(quantized: bool) -> None:
    model = perturb(adapted("vera", quantized=quantized))
    layer = model.get_submodule("model.layers.0.self_attn.v_proj")
    x = torch.randn(2, 3, 64, requires_grad=True)
    assert frozen_base(layer.base_layer, x) is not None
    wanted = [x, layer.vera_lambda_d, layer.vera_lambda_b]
    outputs = [layer(x), layer.adapted_output(x, layer.base_layer(x))]
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*(torch.autograd.grad(output.square().sum(), wanted) for output in outputs))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_base_run_before_gives_the_same(kind: type[Any], form: str, dropout: float) -> None:
    layer = adapted_layer(kind, form, dropout)
    x = torch.randn(2, 3, 64, dtype=torch.float64, requires_grad=True)
    wanted = [x, *trained(layer).values()]
    results = []
    for forward in (layer.forward, lambda x: layer.adapted_output(x, layer.base_layer(x))):
        torch.manual_seed(1)
        output = forward(x)
        results.append([output, *torch.autograd.grad(output.square().sum(), wanted)])
    torch.testing.assert_close(*results)


def test_autocast_computes_in_its_dtype_and_keeps_no_cast_weight() -> None:
    layer = adapted_layer(LoRALinear, "dense").float()
    x = torch.randn(5, 64, requires_grad=True)
    saved: list[Tensor] = []
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        output = layer(x)
        expected = layer.adapted_output(x, layer.base_layer(x))
    assert output.dtype == torch.bfloat16
    # Two of bf16's half units: the base that is run before is rounded before.
    torch.testing.assert_close(output, expected, rtol=2**-7, atol=2**-7)
    output.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    weights = [t for t in saved[:5] if t.shape == (24, 64)]
    assert [t.data_ptr() for t in weights] == [layer.base_layer.weight.data_ptr()]


def test_a_layer_with_hooks_or_a_forward_of_its_own_is_called() -> None:
    x = torch.randn(3, 64, dtype=torch.float64)
    layer = adapted_layer(LoRALinear, "dense")
    calls: list[str] = []
    layer.base_layer.register_forward_hook(lambda *_: calls.append("hook"))
    layer(x)
    assert calls == ["hook"]

    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    assert frozen_base(Doubled(64, 24).double(), x) is None
    assert frozen_base(Conv1D(24, 64).double().requires_grad_(False), x) is None
    assert frozen_base(nn.Linear(64, 24).double(), x) is None  # it trains
    frozen = nn.Linear(64, 24).double().requires_grad_(False)
    base = frozen_base(frozen, x)
    assert base is not None and base.form == DENSE and base.tensors == (frozen.weight, frozen.bias)
    frozen.forward = lambda x: x  # type: ignore[method-assign]
    assert frozen_base(frozen, x) is None


def test_the_output_can_be_written_over() -> None:
    """A residual added in place does so."""
    layer = adapted_layer(LoRALinear, "dense")
    x = torch.randn(2, 3, 64, dtype=torch.float64, requires_grad=True)
    layer(x).add_(1).sum().backward()
    assert x.grad is not None


def test_one_node_a_layer() -> None:
    model = perturb(adapted("lora")).train()
    loss = model(input_ids=tokens(), labels=tokens(), use_cache=False).loss
    names, seen, left = [], set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.append(node.name())
            left += [function for function, _ in node.next_functions]
    assert names.count("LowRankProductBackward") == 14
    assert names.count("MmBackward0") == 1  # the head


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_compiler_takes_it_whole_with_a_trained_bias(kind: type[Any], form: str) -> None:
    layer = adapted_layer(kind, form)
    x = torch.randn(2, 3, 64, dtype=torch.float64, requires_grad=True)
    wanted = [x, *trained(layer).values()]
    expected = torch.autograd.grad(layer(x).square().sum(), wanted)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), wanted), expected)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_an_input_that_lies_transposed_gives_the_same(dropout: float) -> None:
    layer = adapted_layer(LoRALinear, "dense", dropout)
    x = torch.randn(64, 5, dtype=torch.float64)
    results = []
    for laid in (x.t(), x.t().contiguous()):
        torch.manual_seed(1)
        leaf = laid.detach().requires_grad_()
        output = layer(leaf)
        results.append([output, *torch.autograd.grad(output.square().sum(), [leaf, layer.lora_A.weight])])
    torch.testing.assert_close(*results)


@pytest.mark.slow
@pytest.mark.skipif(missing_compiler("cpu") is not None, reason="needs a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_products_are_the_same_operators_and_copy_nothing(dtype: torch.dtype) -> None:
    base = nn.Linear(64, 48, bias=False, dtype=dtype).requires_grad_(False)
    layer = wrapped(LoRALinear, base, rank=4, alpha=8.0)
    nn.init.normal_(layer.lora_B.weight)
    x, direction = torch.randn(256, 64, dtype=dtype), torch.randn(256, 48, dtype=dtype)

    def gradients(forward: Any) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad((forward(leaf) * direction).sum(), [leaf, *layer.factors()])

    counters.clear()
    torch._dynamo.reset()
    with torch._inductor.config.patch(fx_graph_cache=False):
        compiled, codes = run_and_get_code(gradients, torch.compile(layer, fullgraph=True))
    for operator, times in (("low_rank_sum", [1, 1]), ("low_rank_gradients", [0, 1])):
        assert [code.count(f"torch.ops.lightning_peft.{operator}.default(") for code in codes] == times
    assert counters["inductor"]["possibly_missed_reinplacing_opportunities"] == 0
    for actual, expected in zip(compiled, gradients(layer), strict=True):
        torch.testing.assert_close(actual, expected)
