"""The Fastfood projection and the vector shared by all layers."""

import pytest
import torch
from adapter_models import adapted, config_for, llama
from torch import Tensor

from lightning_peft.adapters.inject import SHARED, adapters, inject_adapters
from lightning_peft.adapters.intrinsic import Fastfood, hadamard_matrix, hadamard_transform

CPU = torch.device("cpu")


def dense(projection: Fastfood) -> Tensor:
    """Return P as a matrix, (size, d)."""
    return torch.stack([projection(column) for column in torch.eye(projection.dimension)], dim=1)


@pytest.mark.parametrize("size", [1, 2, 64, 128, 4096])
def test_transform_is_the_hadamard_matrix(size: int) -> None:
    x = torch.randn(3, size, dtype=torch.float64)

    torch.testing.assert_close(hadamard_transform(x), x @ hadamard_matrix(size, CPU, torch.float64))


def test_hadamard_rows_are_orthogonal() -> None:
    H = hadamard_matrix(32, CPU, torch.float32)

    assert torch.equal(H @ H.t(), 32 * torch.eye(32)) and set(H.flatten().tolist()) == {-1.0, 1.0}


def test_projection_is_linear_and_fixed_by_its_seed() -> None:
    first, same, other = (Fastfood(50, 700, seed, CPU) for seed in (3, 3, 4))
    u, v = torch.randn(50), torch.randn(50)

    torch.testing.assert_close(first(2 * u + v), 2 * first(u) + first(v), atol=1e-5, rtol=1e-4)
    assert torch.equal(first(v), same(v)) and not torch.equal(first(v), other(v))


def test_projection_keeps_lengths_on_average() -> None:
    grams = [dense(Fastfood(20, 4096, seed, CPU)) for seed in range(8)]

    mean = sum(P.t() @ P for P in grams) / 8

    # 8 x 4096 random rows: entries deviate by about 1 / sqrt(8 x 4096) x 1.5.
    torch.testing.assert_close(mean, torch.eye(20), atol=0.05, rtol=0)


def test_as_many_dimensions_as_weights_can_represent_any_change() -> None:
    P = dense(Fastfood(64, 64, 0, CPU))

    assert torch.linalg.matrix_rank(P) == 64


def test_layers_have_projections_of_their_own() -> None:
    layers = dict(adapters(adapted("intrinsic")))
    first, second = (layers[f"model.layers.{depth}.self_attn.q_proj"].projection for depth in (0, 1))

    assert not torch.equal(first.signs, second.signs)


def test_projection_of_a_layer_does_not_depend_on_the_others() -> None:
    alone = llama()
    inject_adapters(alone, config_for("intrinsic", target_modules=["q_proj"]))
    name = "model.layers.1.self_attn.q_proj"

    assert torch.equal(
        alone.get_submodule(name).projection.gaussian, adapted("intrinsic").get_submodule(name).projection.gaussian
    )


def test_structure_aware_scales_are_per_block() -> None:
    model = adapted("intrinsic")
    shared = getattr(model, SHARED)
    with torch.no_grad():
        shared.intrinsic_vector.normal_()
        before = {name: layer.delta_weight() for name, layer in adapters(model)}
        shared.block_scales[1] = 3.0

    for name, layer in adapters(model):
        torch.testing.assert_close(layer.delta_weight(), before[name] * (3 if ".layers.1." in name else 1))


@pytest.mark.parametrize(("structure_aware", "scales"), [(True, 2), (False, 0)])
def test_trained_numbers_are_exactly_d(structure_aware: bool, scales: int) -> None:
    shared = getattr(adapted("intrinsic", structure_aware=structure_aware), SHARED)

    assert shared.intrinsic_vector.numel() == 40 - scales
    assert sum(p.numel() for p in shared.parameters()) == 40


def test_dense_change_is_not_kept_for_the_backward_pass() -> None:
    layer = adapted("intrinsic").get_submodule("model.layers.0.self_attn.q_proj")
    x = torch.randn(2, 64)
    kept: list[int] = []

    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(x)

    assert max(kept, default=0) < 64 * 64


def test_too_few_dimensions_are_named() -> None:
    with pytest.raises(ValueError, match="adapter.dimension=2: must be above the 2 blocks adapted"):
        inject_adapters(llama(), config_for("intrinsic", dimension=2))
    with pytest.raises(ValueError, match="adapter.dimension=0: must be at least 1"):
        config_for("intrinsic", dimension=0)
