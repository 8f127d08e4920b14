import pytest
import torch
from torch import nn

from lightning_peft.optim.param_groups import parameter_groups

NAMED = {
    "layers.0.q.lora_A.weight": (4, 8),
    "layers.0.q.lora_B.weight": (8, 4),
    "layers.0.q.lora_magnitude_vector": (8,),
    "embed.lora_embedding_A": (4, 16),
    "embed.lora_embedding_B": (8, 4),
    "layers.0.q.base_layer.bias": (8,),
    "norm.weight": (8,),
    "layers.0.up.lora_A.weight": (4, 8),
}


def named_parameters() -> list[tuple[str, nn.Parameter]]:
    return [(name, nn.Parameter(torch.zeros(shape))) for name, shape in NAMED.items()]


def names_by_group(groups, named) -> dict[str, list[str]]:
    names = {id(parameter): name for name, parameter in named}
    return {group["name"]: [names[id(parameter)] for parameter in group["params"]] for group in groups}


def test_vectors_are_not_decayed():
    named = named_parameters()
    groups = parameter_groups(named, lr=1e-3, weight_decay=0.1)
    assert names_by_group(groups, named) == {
        "decay": [name for name, shape in NAMED.items() if len(shape) == 2],
        "no_decay": [name for name, shape in NAMED.items() if len(shape) == 1],
    }
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-3, 0.1), (1e-3, 0.0)]


def test_lora_plus_raises_B_and_nothing_else():
    named = named_parameters()
    groups = parameter_groups(named, lr=1e-4, weight_decay=0.1, lora_plus_ratio=16)
    assert names_by_group(groups, named) == {
        "A": ["layers.0.q.lora_A.weight", "embed.lora_embedding_A", "layers.0.up.lora_A.weight"],
        "B": ["layers.0.q.lora_B.weight", "embed.lora_embedding_B"],
        "no_decay": ["layers.0.q.lora_magnitude_vector", "layers.0.q.base_layer.bias", "norm.weight"],
    }
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        (1e-4, 0.1),
        (pytest.approx(1.6e-3), 0.1),
        (1e-4, 0.0),
    ]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_lora_plus_ratio_is_the_ratio_of_the_first_updates(optimizer):
    # Equal gradients: SGD moves by lr * grad, Adam's first step by lr * sign(grad)  (Hayou et al., section 3).
    named = [("q.lora_A.weight", nn.Parameter(torch.zeros(4, 4))), ("q.lora_B.weight", nn.Parameter(torch.zeros(4, 4)))]
    grad = torch.randn(4, 4)
    for _, parameter in named:
        parameter.grad = grad.clone()
    optimizer(parameter_groups(named, lr=1e-3, weight_decay=0.0, lora_plus_ratio=16)).step()
    a, b = (parameter.detach().norm() for _, parameter in named)
    torch.testing.assert_close(b / a, torch.tensor(16.0))


def test_order_of_groups_does_not_depend_on_the_order_of_parameters():
    named = named_parameters()
    groups = [parameter_groups(order, 1e-3, 0.1, 16) for order in (named, named[::-1])]
    assert [group["name"] for group in groups[0]] == [group["name"] for group in groups[1]] == ["A", "B", "no_decay"]


def test_frozen_parameters_and_empty_groups_are_left_out():
    named = named_parameters()
    for name, parameter in named:
        parameter.requires_grad_("lora_A" in name)
    assert names_by_group(parameter_groups(named, 1e-3, 0.1), named) == {
        "decay": ["layers.0.q.lora_A.weight", "layers.0.up.lora_A.weight"]
    }


def test_ratio_without_a_B_is_an_error():
    with pytest.raises(ValueError, match="optimizer.lora_plus_ratio=16: no trainable parameter is a lora_B"):
        parameter_groups([("norm.weight", nn.Parameter(torch.zeros(8, 8)))], 1e-3, 0.1, 16)
