"""Weights with room for factors: training as without, and the same model to whatever else reads it."""

import copy
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft.adapters import shared_input
from lightning_peft.adapters.inject import adapters, inject_adapters
from lightning_peft.adapters.merge import merge_adapters
from lightning_peft.adapters.registry import METHODS
from lightning_peft.adapters.shared_input import FactorCopies, adapt_together, share_inputs
from lightning_peft.estimation.model_states import factor_copies
from lightning_peft.estimation.recorder import held_bytes
from lightning_peft.kernels.inside_product import write_into_wide_rows
from lightning_peft.models.loading import load_model
from lightning_peft.models.source import ModelConfig
from lightning_peft.quantization.config import Kind, QuantizationConfig
from lightning_peft.training.compilation import compile_model, missing_compiler
from lightning_peft.training.config import Compilation

IDS = torch.arange(3, 67).view(2, 32)
SIZES = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, vocab_size=80)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(shared_input, "SHARING_DEVICES", {"cpu"})


def adapted(method="lora", dtype=torch.float32, **options):
    """Return a small model of four layers whose adapters change something."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, attention_bias=True, **SIZES)).to(dtype).train()
    inject_adapters(model, METHODS[method].config(method=method, rank=4, **options))
    for _, layer in adapters(model):
        torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
    return model


def with_room(model):
    """Have the model's changes computed inside its products, and return what keeps the factors."""
    copies = FactorCopies(share_inputs(model), in_weights=True)
    copies.refresh()
    return copies


def gradients(model):
    """Return the loss and the gradients of all that trains."""
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("options", [{}, {"rank_stabilized": True}, {"rank_pattern": {"k_proj": 5, "up_proj": 1}}])
def test_training_is_as_without_room(method, options):
    if options.get("rank_pattern"):  # layers share an input where their scaling is one
        options = options | {"alpha_pattern": {"k_proj": 10.0, "up_proj": 2.0}}
    expected = gradients(adapted(method, **options))
    model = adapted(method, **options)
    copies = with_room(model)
    assert all(group.edges is not None for group in copies.groups)
    assert_close(gradients(model), expected, rtol=1e-4, atol=1e-6)


def test_blocks_are_computed_again_as_before():
    expected = gradients(adapted())
    model = adapted()
    with_room(model)
    for layer in model.model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    assert_close(gradients(model), expected, rtol=1e-4, atol=1e-6)


def test_16_bits_lose_no_more_than_without_room():
    exact, without, model = (adapted(dtype=torch.bfloat16) for _ in range(3))
    exact.float()
    adapt_together(without, without.model)
    adapt_together(model, model.model, in_weights=True)

    def loss_of(found, expected):
        return sum(((found[name] - own).norm() / own.norm()).item() for name, own in expected.items())

    for _ in range(2):  # the second time by other factors
        _, expected = gradients(exact)
        assert loss_of(gradients(model)[1], expected) < 1.05 * loss_of(gradients(without)[1], expected)
        for one in (exact, without, model):
            with torch.no_grad():
                for name, parameter in one.named_parameters():
                    if name in expected:
                        parameter.sub_(expected[name], alpha=0.1)


def test_compiled_blocks_are_as_others_and_share_their_code():
    expected = gradients(adapted())
    model = adapted()
    with_room(model)
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compile_model(model, Compilation.blocks, backend=counting)
    for _ in range(2):
        assert_close(gradients(model), expected, rtol=1e-4, atol=1e-6)
    assert len(graphs) == 2  # the first block's input has no gradient


def test_the_model_is_the_same_to_others(tmp_path):
    model, plain = adapted(), adapted()
    before = copy.deepcopy(model.state_dict())
    parameters = dict(model.named_parameters())
    with_room(model)
    gradients(model)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    with torch.no_grad():
        assert_close(model.eval()(IDS).logits, plain.eval()(IDS).logits)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "base")
    assert_close(load_file(tmp_path / "base"), dict(before), rtol=0, atol=0)
    merged, expected = merge_adapters(model), merge_adapters(plain)
    assert_close(dict(merged.state_dict()), dict(expected.state_dict()))
    merged.save_pretrained(tmp_path / "merged")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert_close(dict(loaded.state_dict()), dict(expected.state_dict()))


def test_room_is_found_again_after_a_move_and_another_rank():
    model = adapted()
    copies = with_room(model)
    group = copies.groups[0]
    first = group.edges
    with torch.no_grad():  # what a move to another device and back leaves
        for layer in group.layers:
            layer.base_layer.weight.data = 2 * layer.base_layer.weight.data
    copies.refresh()
    assert group.edges is not first
    layer = group.layers[0]
    layer.set_factors(torch.ones(2, layer.lora_A.in_features), torch.ones(layer.lora_B.out_features, 2))
    copies.refresh()
    assert group.edges.factors[0].shape[1] == 2
    weight = layer.base_layer.weight
    assert_close(group.edges.beside[0][:, : weight.shape[1]], weight.data)
    plain = adapted()
    own = [dict(plain.named_modules())[name] for name, found in model.named_modules() if found in group.layers]
    for found in own:
        found.base_layer.weight.data.mul_(2)
    own[0].set_factors(torch.ones(2, layer.lora_A.in_features), torch.ones(layer.lora_B.out_features, 2))
    assert_close(gradients(model), gradients(plain), rtol=1e-4, atol=1e-6)


def test_weights_of_another_tensor_and_large_ranks_are_left():
    model, large = adapted(), adapted(rank_pattern={"q_proj": 60, "k_proj": 60, "v_proj": 60})
    both = torch.zeros(64, 32)
    layer = model.model.layers[0].self_attn.o_proj
    both[:32] = layer.base_layer.weight.data
    layer.base_layer.weight.data = both[:32]
    copies = with_room(model)
    assert [group.layers for group in copies.groups if group.edges is None] == [(layer,)]
    assert layer.base_layer.weight.data_ptr() == both.data_ptr()
    left = [group.layers[0] for group in with_room(large).groups if group.edges is None]
    assert left == [block.self_attn.q_proj for block in large.model.layers]


@pytest.mark.parametrize("kind", [None, "nf4"])
def test_what_is_kept_is_what_is_estimated(kind):
    model = adapted(dtype=torch.bfloat16)
    if kind is not None:
        model = load_model(ModelConfig(name="tiny"), torch.bfloat16, QuantizationConfig(kind=Kind[kind], block_size=32))
        inject_adapters(model, METHODS["lora"].config(method="lora", rank=4))
    estimated = held_bytes(factor_copies(model))
    copies = with_room(model)
    assert any(group.edges is not None for group in copies.groups)
    held = [tensor for group in copies.groups for tensor in (group.copies[0], *group.copies[1])]
    held += [tensor for group in copies.groups if group.edges for tensor in (group.edges.below, *group.edges.beside)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    own = {weight.untyped_storage().data_ptr(): weight.nbytes for weight in model.parameters()}
    assert sum(nbytes - own.get(place, 0) for place, nbytes in storages.items()) == estimated


@pytest.mark.slow
@pytest.mark.skipif(missing_compiler("cpu") is not None, reason="no compiler")
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_compilers_own_code_writes_into_wide_rows(method):
    expected = gradients(adapted(method))
    model = adapted(method)
    with_room(model)
    write_into_wide_rows()
    torch._dynamo.reset()
    compile_model(model, Compilation.blocks)
    assert_close(gradients(model), expected, rtol=1e-4, atol=1e-6)
