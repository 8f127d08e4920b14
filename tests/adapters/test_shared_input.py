"""Layers that share an input, computed together: as each by itself, in value, gradients and what is stored."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft.adapters import shared_input
from lightning_peft.adapters.dora import DoRALinear
from lightning_peft.adapters.inject import adapters, disable_adapters, inject_adapters
from lightning_peft.adapters.registry import METHODS
from lightning_peft.adapters.shared_input import FactorCopies, adapt_together, share_inputs
from lightning_peft.kernels.low_rank import scaled_sum
from lightning_peft.models.loading import load_model
from lightning_peft.models.source import ModelConfig
from lightning_peft.quantization.config import Kind, QuantizationConfig
from lightning_peft.training.compilation import compile_model
from lightning_peft.training.config import Compilation


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(shared_input, "SHARING_DEVICES", {"cpu"})


def adapted(dtype=torch.float32, kind=None, method="lora", **options):
    """Return a tiny model whose adapters change something."""
    sizes = {"nf4": {"block_size": 32}, "int8": {"block_size": 64, "double_quantization": False}}
    quantization = None if kind is None else QuantizationConfig(kind=Kind[kind], **sizes[kind])
    torch.manual_seed(0)
    model = load_model(ModelConfig(name="tiny"), dtype, quantization)
    inject_adapters(model, METHODS[method].config(method=method, rank=4, **options))
    for _, layer in adapters(model):
        torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
        if method == "dora":
            with torch.no_grad():
                layer.lora_magnitude_vector.mul_(1 + 0.1 * torch.randn_like(layer.lora_magnitude_vector))
    return model.train()


def gradients(model, ids):
    """Return the loss and the gradients of all that trains."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


IDS = torch.arange(3, 67).view(2, 32)
SIZES = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, vocab_size=80)
# In bf16 the sums are the same and are rounded in other orders: two of its units.
TOLERANCES = {torch.float32: dict(rtol=1e-4, atol=1e-6), torch.bfloat16: dict(rtol=0.05, atol=0.02)}


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("kind", [None, "nf4", "int8"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("copied", [False, True])
def test_shared_layers_learn_what_each_learns_alone(method, kind, dtype, copied):
    alone, together = adapted(dtype, kind, method), adapted(dtype, kind, method)
    groups = share_inputs(together)
    if copied:
        FactorCopies(groups).before_forward(together, None)
    (loss, expected), (found_loss, found) = gradients(alone, IDS), gradients(together, IDS)
    assert_close(found_loss, loss, **TOLERANCES[dtype])
    assert found.keys() == expected.keys()
    for name in expected:
        scale = expected[name].abs().max()
        assert_close(
            found[name] / scale, expected[name] / scale, msg=lambda m, n=name: f"{n}: {m}", **TOLERANCES[dtype]
        )


@pytest.mark.parametrize("biases_train", [False, True])
def test_magnitudes_are_under_the_bias(biases_train):
    models = []
    for shared in (False, True):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, attention_bias=True, **SIZES)).double().train()
        options = {"bias": "all"} if biases_train else {}
        inject_adapters(model, METHODS["dora"].config(method="dora", rank=4, **options))
        for _, layer in adapters(model):
            layer.double().norms.squared = layer.norms.squared.double()
            with torch.no_grad():
                for parameter in layer.parameters():
                    if parameter.requires_grad or parameter.dim() == 1:
                        parameter.add_(0.1 * torch.randn_like(parameter))
        if shared:
            share_inputs(model)
        models.append(gradients(model, IDS))
    (loss, expected), (found_loss, found) = models
    assert_close(found_loss, loss)
    assert_close(found, expected)


@pytest.mark.parametrize("zero", [False, True])
def test_scaled_sums_pass_gradcheck(zero):
    torch.manual_seed(0)
    total, gain, bias = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 5), 5, 5))
    assert torch.autograd.gradcheck(lambda total, *rest: scaled_sum(total.clone(), *rest), (total, gain, bias))
    if zero:  # the rest of the sum then says nothing of the gain
        with torch.no_grad():
            gain[1] = 0
        scaled_sum(total.clone(), gain, bias).sum().backward()
        assert gain.grad[1] == 0 and gain.grad.isfinite().all()


def test_norms_are_taken_once_a_step(monkeypatch):
    model = adapted(method="dora")
    adapt_together(model, model.model)
    calls = []
    plain = DoRALinear.weight_norms
    monkeypatch.setattr(DoRALinear, "weight_norms", lambda self: calls.append(self) or plain(self))
    for layer in model.model.layers:
        monkeypatch.setattr(layer, "forward", partial(checkpoint, layer.forward, use_reentrant=False))
    first, before = gradients(model, IDS)
    layers = [layer for _, layer in adapters(model) if isinstance(layer, DoRALinear)]
    assert calls == layers  # it is not drawn again where blocks are computed again
    with torch.no_grad():
        for layer in layers:
            layer.lora_B.weight.mul_(2)
    second, after = gradients(model, IDS)
    assert len(calls) == 2 * len(layers) and first != second
    alone = adapted(method="dora")
    for _, layer in adapters(alone):
        layer.lora_B.weight.data.mul_(2)
    assert_close((second, after), gradients(alone, IDS), rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # this is like an optimiser's step, behind which health is measured and a model may be merged
        for layer in [*layers, *(layer for _, layer in adapters(alone) if isinstance(layer, DoRALinear))]:
            layer.lora_B.weight.mul_(3)
            layer.lora_magnitude_vector.mul_(1.1)
    own = [layer for _, layer in adapters(alone) if isinstance(layer, DoRALinear)]
    for layer, expected in zip(layers, own, strict=True):
        assert layer.training and layer.norms.of_step is not None and expected.norms.of_step is None
        assert_close(layer.delta_weight(), expected.delta_weight())
        with torch.no_grad():
            assert_close(layer.gain(), expected.gain())


def test_every_group_reads_its_input_once():
    model = adapted()
    groups = share_inputs(model)
    seen = []
    original = shared_input.add_low_rank_to_each

    def counted(bases, *rest):
        seen.append(len(bases))
        return original(bases, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_input, "add_low_rank_to_each", counted)
        gradients(model, IDS)
    blocks = model.config.num_hidden_layers
    assert sorted(seen) == sorted([3, 1, 2, 1] * blocks)  # q k v, o, gate up, down
    assert sum(len(group.layers) for group in groups) == len(list(adapters(model))) - outside(model)
    assert all(not group.waiting and group.x is None for group in groups)


def outside(model):
    """Return how many adapted layers the blocks do not have."""
    return sum(1 for name, _ in adapters(model) if ".layers." not in name)


def test_nothing_else_is_stored():
    plain, shared = adapted(), adapted()
    share_inputs(shared)
    assert list(shared.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in adapters(shared)] == [name for name, _ in adapters(plain)]


def test_a_layer_with_another_input_computes_by_itself():
    model = adapted()
    share_inputs(model)
    attention = model.model.layers[0].self_attn
    x, other = torch.randn(1, 5, model.config.hidden_size), torch.randn(1, 5, model.config.hidden_size)
    attention.q_proj(x)
    found = attention.k_proj(other)
    alone = attention.k_proj.adapted_output(other, attention.k_proj.base_layer(other))
    assert_close(found, alone)
    assert_close(attention.v_proj(x), attention.v_proj.adapted_output(x, attention.v_proj.base_layer(x)))


@pytest.mark.parametrize("how", ["eval", "no grad", "disabled", "dropout", "other scaling"])
def test_layers_that_cannot_share_are_as_before(how):
    options = {"dropout": 0.1} if how == "dropout" else {}
    if how == "other scaling":
        options = {"alpha_pattern": {"k_proj": 1.0}}
    model = adapted(**options)
    groups = share_inputs(model)
    attention = model.model.layers[0].self_attn
    x = torch.randn(1, 5, model.config.hidden_size)
    model.train(how != "eval")
    with torch.set_grad_enabled(how != "no grad"):
        if how == "disabled":
            with disable_adapters(model):
                assert_close(attention.q_proj(x), attention.q_proj.base_layer(x))
        else:
            attention.q_proj(x)
    assert not any(group.waiting for group in groups)


def test_copies_follow_the_factors():
    model = adapted(torch.bfloat16)
    copies = FactorCopies(share_inputs(model))
    copies.refresh()
    layer = model.model.layers[1].mlp.up_proj
    with torch.no_grad():
        layer.lora_B.weight.mul_(3)
    copies.refresh()
    group, place = layer.shared_input
    assert torch.equal(group.copies[1][place], layer.lora_B.weight.bfloat16())
    layer.set_factors(torch.ones(2, layer.lora_A.in_features), torch.ones(layer.lora_B.out_features, 2))
    copies.refresh()
    assert group.copies[1][place].shape == layer.lora_B.weight.shape


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_equal_blocks_share_one_graph(method):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, attention_bias=True, **SIZES)).train()
    inject_adapters(model, METHODS[method].config(method=method, rank=4))
    adapt_together(model, model.model)
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    expected = gradients(model, IDS)
    torch._dynamo.reset()
    compile_model(model, Compilation.blocks, backend=counting)
    for _ in range(2):
        assert_close(gradients(model, IDS), expected, rtol=1e-4, atol=1e-6)
    assert len(graphs) == 2  # the first block's input has no gradient
