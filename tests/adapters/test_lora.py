"""LoRA and LoRA-FA against their formulas."""

import pytest
import torch
import torch.nn.functional as F
from adapter_models import wrapped
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_peft.adapters.initialization import INITS
from lightning_peft.adapters.lora import LoRAConfig, LoRAEmbedding, LoRALinear
from lightning_peft.adapters.lora_fa import LoRAFALinear
from lightning_peft.adapters.merge import merge_adapters


@pytest.mark.parametrize(("rank_stabilized", "scaling"), [(False, 2.0), (True, 4.0)])
def test_forward_is_the_formula(rank_stabilized: bool, scaling: float) -> None:
    layer = wrapped(LoRALinear, nn.Linear(6, 5), rank=4, alpha=8.0, rank_stabilized=rank_stabilized)
    nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(3, 6)

    low_rank = x @ layer.lora_A.weight.t() @ layer.lora_B.weight.t()

    torch.testing.assert_close(layer(x), layer.base_layer(x) + scaling * low_rank)


def test_conv1d_stores_its_weight_transposed() -> None:
    layer = wrapped(LoRALinear, Conv1D(5, 6), rank=2, alpha=4.0)
    nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(3, 6)
    expected = layer(x)

    merged = merge_adapters(nn.Sequential(layer))

    torch.testing.assert_close(merged(x), expected)


def test_default_start_is_uniform_with_the_papers_bound() -> None:
    A = wrapped(LoRALinear, nn.Linear(400, 8), rank=64, alpha=128.0).lora_A.weight

    assert A.abs().max() <= 1 / 20 and A.abs().max() > 0.99 / 20
    # The deviation of a uniform of half width h is h / sqrt(3); 25,600 draws.
    torch.testing.assert_close(A.std(), torch.tensor(1 / 20 / 3**0.5), rtol=0.02, atol=0)


def test_gaussian_start_has_deviation_one_over_rank() -> None:
    A = wrapped(LoRALinear, nn.Linear(400, 8), rank=64, alpha=128.0, init="gaussian").lora_A.weight

    torch.testing.assert_close(A.std(), torch.tensor(1 / 64), rtol=0.02, atol=0)


def test_dropout_drops_and_rescales_the_input_of_A() -> None:
    layer = wrapped(LoRALinear, nn.Linear(6, 5), rank=2, alpha=2.0, dropout=0.5).train()
    nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(4, 6)

    torch.manual_seed(5)
    actual = layer(x)

    torch.manual_seed(5)
    dropped = F.dropout(x, 0.5)
    torch.testing.assert_close(
        actual, layer.base_layer(x) + dropped @ layer.lora_A.weight.t() @ layer.lora_B.weight.t()
    )
    torch.testing.assert_close(layer.eval()(x), layer.base_layer(x) + x @ layer.delta_weight().t())


def test_embedding_is_the_formula() -> None:
    layer = wrapped(LoRAEmbedding, nn.Embedding(10, 6), rank=2, alpha=4.0)
    nn.init.normal_(layer.lora_embedding_A)
    ids = torch.tensor([[3, 3, 9]])

    change = layer.lora_embedding_B @ layer.lora_embedding_A

    torch.testing.assert_close(layer(ids), layer.base_layer(ids) + 2 * change.t()[ids])


def test_embedding_has_no_spectral_start() -> None:
    with pytest.raises(ValueError, match="adapter.init=pissa is not defined for embeddings"):
        wrapped(LoRAEmbedding, nn.Embedding(10, 6), rank=2, alpha=4.0, init="pissa")


def test_frozen_A_keeps_no_input_for_the_backward_pass() -> None:
    x = torch.randn(64, 512)
    sizes: dict[type, int] = {}
    for kind in (LoRALinear, LoRAFALinear):
        layer = wrapped(kind, nn.Linear(512, 8).requires_grad_(False), rank=4, alpha=8.0)
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):  # noqa: B023
            layer(x)
        sizes[kind] = sum(saved)

    assert sizes[LoRALinear] - sizes[LoRAFALinear] == x.numel()


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_dropout_out_of_range_is_named(dropout: float) -> None:
    with pytest.raises(ValueError, match=r"adapter\.dropout=.*: must be in \[0, 1\)"):
        LoRAConfig(dropout=dropout)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "adapter.rank=0: a rank is at least 1"),
        ({"rank": None}, "adapter.rank=null: method 'lora' needs a rank"),
        ({"alpha": -1.0}, "adapter.alpha=-1.0: must be above 0"),
        ({"rank_pattern": {"q_proj": 0}}, "adapter.q_proj=0|rank_pattern"),
        ({"eva_rho": 0.5}, "adapter.eva_rho=0.5: must be at least 1"),
    ],
)
def test_bad_option_is_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**options)


def test_only_spectral_starts_bound_the_rank() -> None:
    bound = {init for init in INITS if LoRAConfig(init=init).rank_within_layer}

    assert bound == {"pissa", "pissa_fast", "olora", "eva", "loftq"}
