"""Starts of A and B, those that rewrite the base, and the export of the latter."""

from typing import Any

import peft
import pytest
import torch
from adapter_models import adapted, llama, logits, perturb, reset, tokens, wrapped
from torch import Tensor, nn

from lightning_peft.adapters.eva import initialize_from_activations
from lightning_peft.adapters.initialization import INITS, initialize_from_weights
from lightning_peft.adapters.inject import adapters, inject_adapters
from lightning_peft.adapters.lora import LoRAConfig, LoRALinear
from lightning_peft.quantization.weights import dense_weight

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
REWRITING = ["pissa", "pissa_fast", "olora"]
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def layer_of(init: str, rank: int = 4, **options: Any) -> tuple[LoRALinear, Tensor]:
    torch.manual_seed(0)
    base_layer = nn.Linear(24, 16)
    weight = base_layer.weight.detach().clone()
    return wrapped(LoRALinear, base_layer, rank, alpha=8.0, init=init, **options), weight


@pytest.mark.parametrize("init", [*REWRITING, "orthogonal"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_start_changes_nothing(init: str, method: str) -> None:
    model = adapted(method, init=init)

    # fp32: W - s B A + s B A.
    torch.testing.assert_close(logits(model), logits(llama()), atol=2e-4, rtol=1e-3)
    assert all(layer.lora_B.weight.abs().max() > 0 for _, layer in adapters(model))


@pytest.mark.parametrize("init", ["pissa", "pissa_fast"])
def test_pissa_takes_the_best_low_rank_part(init: str) -> None:
    layer, weight = layer_of(init)
    U, S, Vh = torch.linalg.svd(weight)
    best = U[:, :4] @ torch.diag(S[:4]) @ Vh[:4]

    torch.testing.assert_close(layer.delta_weight(), best, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(layer.base_layer.weight, weight - best, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(layer.lora_A.weight.norm(dim=1), layer.lora_B.weight.norm(dim=0))


@pytest.mark.parametrize("init", REWRITING)
def test_second_reset_starts_from_the_untouched_base(init: str) -> None:
    layer, weight = layer_of(init)
    first = layer.delta_weight().clone()
    nn.init.normal_(layer.lora_B.weight)

    layer.reset_parameters()

    torch.testing.assert_close(layer.delta_weight(), first, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer.base_layer.weight + layer.delta_weight(), weight, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("init", "theirs"), [("pissa", "pissa"), ("olora", "olora")])
def test_base_and_change_are_those_of_peft(init: str, theirs: str) -> None:
    ours = adapted("lora", init=init)
    twin = peft.get_peft_model(
        llama(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS, init_lora_weights=theirs)
    )

    for name, layer in adapters(ours):
        other = twin.get_submodule(f"base_model.model.{name}")
        torch.testing.assert_close(layer.base_layer.weight, other.base_layer.weight, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(layer.delta_weight(), other.get_delta_weight("default"), atol=1e-4, rtol=1e-3)


def test_orthogonal_start_has_no_product() -> None:
    layer, weight = layer_of("orthogonal")

    torch.testing.assert_close(layer.delta_weight(), torch.zeros_like(weight), atol=1e-6, rtol=0)
    assert torch.equal(layer.base_layer.weight, weight)


def test_orthogonal_start_needs_an_even_rank() -> None:
    with pytest.raises(ValueError, match="adapter.rank=3: adapter.init=orthogonal splits the rank in two"):
        layer_of("orthogonal", rank=3)


@pytest.mark.parametrize("init", REWRITING)
@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_plain_factors_on_a_fresh_base_in_peft_are_the_model(init: str, rank_stabilized: bool) -> None:
    ours = perturb(adapted("lora", init=init, rank_stabilized=rank_stabilized))
    alpha = 8 * (2**0.5 if rank_stabilized else 2)
    twin = peft.get_peft_model(
        llama(), peft.LoraConfig(r=8, lora_alpha=alpha, use_rslora=rank_stabilized, target_modules=LINEARS)
    ).eval()
    state = {}
    for name, layer in adapters(ours):
        own = layer.published(dict(layer.named_parameters()))
        A, B = own["lora_A.weight"], own["lora_B.weight"]
        assert A.shape[0] == B.shape[1] == 8
        state |= {f"base_model.model.{name}.lora_A.weight": A, f"base_model.model.{name}.lora_B.weight": B}

    assert not peft.set_peft_model_state_dict(twin, state).unexpected_keys

    torch.testing.assert_close(logits(twin), logits(ours), atol=1e-3, rtol=1e-3)
    assert not torch.allclose(logits(ours), logits(llama()), atol=0.05)


def test_plain_factors_of_an_untouched_base_are_the_layers_own() -> None:
    layer, _ = layer_of("kaiming")

    own = dict(layer.named_parameters())

    assert layer.published(own) is own


@pytest.mark.parametrize("init", REWRITING)
def test_codes_hold_what_is_left_of_the_dequantised_weight(init: str) -> None:
    """On a 4-bit base the layer starts within the error of quantising the rest, which is smaller than the weight."""
    plain = dict(llama(quantized=True).named_modules())
    model = adapted("lora", quantized=True, init=init)

    for name, layer in adapters(model):
        weight = dense_weight(plain[name])
        now = dense_weight(layer.base_layer) + layer.delta_weight()
        # Half of the widest gap between two NF4 codes, 0.152 of a block's largest weight, and 8-bit scales.
        assert (now - weight).abs().max() <= 0.16 * (weight - layer.delta_weight()).abs().max()


@pytest.mark.parametrize("init", ["loftq", "pissa"])
def test_original_weights_start_closer_to_the_dense_model(init: str) -> None:
    dense = dict(llama().named_modules())
    model = adapted("lora", quantized=True, init=init)
    quantised = {
        name: dense_weight(module) for name, module in llama(quantized=True).named_modules() if name.endswith("_proj")
    }

    done = initialize_from_weights(dict(adapters(model)), lambda name: dense[name].weight)

    assert done == 14
    for name, layer in adapters(model):
        before = (quantised[name] - dense[name].weight).norm()
        after = (dense_weight(layer.base_layer) + layer.delta_weight() - dense[name].weight).norm()
        assert after < 0.95 * before


def test_loftq_is_the_best_product_for_the_loss_and_keeps_the_codes() -> None:
    dense = dict(llama().named_modules())
    model = adapted("lora", quantized=True, init="loftq")
    name, layer = next(adapters(model))
    codes = layer.base_layer.weight.clone()

    initialize_from_weights({name: layer}, lambda name: dense[name].weight)

    U, S, Vh = torch.linalg.svd(dense[name].weight.detach() - dense_weight(layer.base_layer))
    best = U[:, :4] @ torch.diag(S[:4]) @ Vh[:4]
    torch.testing.assert_close(layer.delta_weight(), best, atol=1e-5, rtol=1e-3)
    assert torch.equal(layer.base_layer.weight, codes)
    assert layer.initial_A is None


def test_loftq_on_a_dense_base_is_refused() -> None:
    model = adapted("lora", init="loftq")

    with pytest.raises(ValueError, match="adapter.init=loftq makes up for quantisation: use quantization=nf4"):
        initialize_from_weights(dict(adapters(model)), lambda name: torch.zeros(1))


def batches() -> list[dict[str, Tensor]]:
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[:, 9:] = 0
    return [{"input_ids": tokens(), "attention_mask": mask}, {"input_ids": tokens().flip(0), "attention_mask": mask}]


def inputs_of(name: str) -> Tensor:
    """Return what a layer is fed by the batches, without padding, (tokens, width)."""
    model, seen = llama(), []
    model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][:, :9].flatten(0, 1)))
    with torch.no_grad():
        for batch in batches():
            model(**batch)
    return torch.cat(seen)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"])
def test_eva_spans_the_leading_directions_of_the_inputs(name: str) -> None:
    model = adapted("lora", init="eva")

    ranks = initialize_from_activations(model, batches(), rho=1.0)

    layer = model.get_submodule(name)
    _, S, Vh = torch.linalg.svd(inputs_of(name))
    A = layer.lora_A.weight.detach()
    assert set(ranks.values()) == {4}
    torch.testing.assert_close(A @ A.t(), torch.eye(4), atol=1e-4, rtol=0)
    captured = (inputs_of(name) @ A.t()).square().sum()
    # A sketch of two batches, not the whole decomposition: at most 2 % less energy than the best four directions.
    assert captured >= 0.98 * S[:4].square().sum()
    assert layer.lora_B.weight.abs().max() == 0


def test_eva_moves_ranks_and_keeps_their_sum_and_scaling() -> None:
    model = adapted("lora", init="eva")
    expected = logits(llama())

    ranks = initialize_from_activations(model, batches(), rho=2.0)

    layers = dict(adapters(model))
    assert sum(ranks.values()) == 14 * 4 and len(set(ranks.values())) > 1
    assert 1 <= min(ranks.values()) and max(ranks.values()) <= 8
    assert {name: layer.rank for name, layer in layers.items()} == ranks
    assert {layer.scaling for layer in layers.values()} == {2.0}
    assert torch.equal(logits(model), expected)
    perturb(model)
    assert not torch.allclose(logits(model), expected, atol=1e-2)


def test_eva_is_the_same_every_time() -> None:
    models = [adapted("lora", init="eva") for _ in range(2)]
    torch.manual_seed(11)
    initialize_from_activations(models[0], batches())
    torch.manual_seed(12)
    initialize_from_activations(models[1], batches())

    for (_, one), (_, other) in zip(adapters(models[0]), adapters(models[1]), strict=True):
        assert torch.equal(one.lora_A.weight, other.lora_A.weight)


def test_eva_without_batches_is_an_error() -> None:
    with pytest.raises(ValueError, match="adapter.init=eva: model.layers.0.self_attn.q_proj saw no tokens"):
        initialize_from_activations(adapted("lora", init="eva"), [])


@pytest.mark.parametrize("init", INITS)
def test_meta_model_starts_after_reset(init: str) -> None:
    real = llama()
    with torch.device("meta"):
        model = type(real)(real.config)
    inject_adapters(model, LoRAConfig(rank=4, init=init))
    model.to_empty(device="cpu")
    model.model.rotary_emb = real.model.rotary_emb
    names = {name.replace(".base_layer", ""): name for name in model.state_dict()}
    model.load_state_dict({names[n]: tensor.clone() for n, tensor in real.state_dict().items()}, strict=False)

    reset(model)

    torch.testing.assert_close(logits(model.eval()), logits(real), atol=2e-4, rtol=1e-3)
