"""VeRA, IA3, MiSS and HiRA against their formulas."""

import pytest
import torch
from adapter_models import adapted, config_for, llama, wrapped
from torch import Tensor, nn

from lightning_peft.adapters.hira import HiRALinear
from lightning_peft.adapters.ia3 import IA3Linear
from lightning_peft.adapters.inject import SHARED, adapters, inject_adapters
from lightning_peft.adapters.merge import merge_adapters
from lightning_peft.adapters.miss import MiSSLinear
from lightning_peft.kernels.frozen_linear import given
from lightning_peft.kernels.hadamard import hadamard_product
from lightning_peft.kernels.low_rank import add_vectors


def test_vera_product_passes_gradcheck() -> None:
    torch.manual_seed(0)
    shapes = [(2, 3, 5), (2, 3, 4), (2, 4), (5, 2), (2,), (5,)]
    inputs = [
        torch.randn(shape, dtype=torch.float64, requires_grad=i in (0, 1, 4, 5)) for i, shape in enumerate(shapes)
    ]

    def product(base_output: Tensor, *rest: Tensor) -> Tensor:
        return add_vectors(given(base_output.clone()), *rest)

    assert torch.autograd.gradcheck(product, inputs)


def test_vera_pair_has_the_largest_sizes_and_is_one_object() -> None:
    model = adapted("vera")
    shared = getattr(model, SHARED)

    assert shared.vera_A.shape == (4, 128) and shared.vera_B.shape == (128, 4)
    assert {layer._shared[0] for _, layer in adapters(model)} == {shared}
    assert sum("vera_A" in name for name in model.state_dict()) == 1


@pytest.mark.parametrize("save_projection", [True, False])
def test_vera_pair_is_in_the_state_only_if_saved(save_projection: bool) -> None:
    names = adapted("vera", save_projection=save_projection).state_dict()

    assert (f"{SHARED}.vera_A" in names) is save_projection


def test_vera_layer_follows_the_pair_to_another_dtype() -> None:
    model = adapted("vera").double()

    A, _ = next(layer for _, layer in adapters(model)).projection()

    assert A.dtype == torch.float64


def test_vera_start() -> None:
    _, layer = next(adapters(adapted("vera", initial_d=0.05)))

    assert torch.equal(layer.vera_lambda_d, torch.full((4,), 0.05)) and layer.vera_lambda_b.abs().max() == 0


def test_vera_has_one_rank() -> None:
    with pytest.raises(ValueError, match="the layers of VeRA share one pair, so one rank"):
        config_for("vera", rank_pattern={"q_proj": 2})


def test_ia3_rescales_inputs_of_feed_forward_outputs_and_outputs_of_the_rest() -> None:
    shapes = {name.rpartition(".")[2]: layer.ia3_l.shape for name, layer in adapters(adapted("ia3"))}

    assert shapes == {"k_proj": (32, 1), "v_proj": (32, 1), "down_proj": (1, 128)}


@pytest.mark.parametrize("scales_input", [False, True])
def test_ia3_is_the_formula(scales_input: bool) -> None:
    layer = wrapped(IA3Linear, nn.Linear(6, 5), feed_forward=["layer"] if scales_input else [])
    nn.init.normal_(layer.ia3_l)
    x = torch.randn(3, 6)
    scale = layer.ia3_l.flatten()

    expected = layer.base_layer(x * scale) if scales_input else layer.base_layer(x) * scale

    torch.testing.assert_close(layer(x), expected)
    merged = merge_adapters(nn.Sequential(layer))
    torch.testing.assert_close(merged(x), expected)


@pytest.mark.parametrize("rank", [1, 4, 5, 6])
def test_miss_adds_one_block_to_every_group_of_inputs(rank: int) -> None:
    layer = wrapped(MiSSLinear, nn.Linear(6, 5), rank)
    nn.init.normal_(layer.miss_block)
    x = torch.randn(3, 6)
    change = torch.stack([layer.miss_block[j % rank] for j in range(6)], dim=1)

    torch.testing.assert_close(layer.delta_weight(), change)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ change.t())


def test_miss_rank_above_the_inputs_is_named() -> None:
    with pytest.raises(ValueError, match="adapter.rank=65: above the 64 inputs of model.layers.0.self_attn.q_proj"):
        inject_adapters(llama(), config_for("miss", rank=65))


def test_hira_product_passes_gradcheck() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 4, dtype=torch.float64)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in [(3, 4), (2, 4), (5, 2)]]

    assert torch.autograd.gradcheck(lambda *tensors: hadamard_product(*tensors, lambda: weight), inputs)


def test_hira_change_can_have_full_rank() -> None:
    layer = wrapped(HiRALinear, nn.Linear(16, 16), rank=2)
    nn.init.normal_(layer.hira_B)

    assert torch.linalg.matrix_rank(layer.delta_weight().detach()) > 2


@pytest.mark.parametrize("method", ["vera", "miss", "hira", "adalora", "lora", "dora"])
def test_dropout_out_of_range_is_named(method: str) -> None:
    with pytest.raises(ValueError, match=r"adapter\.dropout=1\.5: must be in \[0, 1\)"):
        config_for(method, dropout=1.5)
