"""Adapters in slots: every row is what its adapter alone gives, in bf16 and on 4-bit bases too."""

import pytest
import torch
from adapter_models import adapted, llama, logits, perturb, tokens
from torch import nn

from lightning_peft.adapters.base import LowRank
from lightning_peft.adapters.inject import adapters, inject_adapters
from lightning_peft.adapters.lora import LoRAConfig
from lightning_peft.adapters.slots import Slots, cast_factors

CONFIGS = [
    LoRAConfig(rank=4),
    LoRAConfig(rank=8, alpha=3.0, target_modules=["q_proj", "v_proj"]),
    LoRAConfig(rank=2, alpha=16, rank_stabilized=True, target_modules=["mlp"]),
]


def alone(number: int, dtype: torch.dtype = torch.float32, quantized: bool = False) -> nn.Module:
    model = llama(dtype, quantized)
    torch.manual_seed(number)
    inject_adapters(model, CONFIGS[number])
    return perturb(model, 0.05 + 0.02 * number)


def change_of(model: nn.Module) -> dict[str, LowRank]:
    return {name: change for name, layer in adapters(model) if (change := layer.low_rank()) is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
def test_row_equals_its_adapter_alone(quantized: bool, dtype: torch.dtype) -> None:
    model = llama(dtype, quantized)
    slots = Slots(model, count=4, rank=8, dtype=dtype)
    for number in range(3):
        slots.load((2, 0, 3)[number], cast_factors(change_of(alone(number, dtype, quantized)), dtype))
    ids = tokens(1).expand(4, -1)

    with torch.no_grad(), slots.routed([2, -1, 3, 0]):
        together = model(ids, use_cache=False).logits

    for row, number in enumerate((0, None, 2, 1)):
        own = llama(dtype, quantized) if number is None else alone(number, dtype, quantized)
        expected = own(ids[:1], use_cache=False).logits[0].detach()
        if dtype is torch.float32:
            # Sums of more rows, in another order.
            torch.testing.assert_close(together[row], expected, rtol=1e-5, atol=2e-5)
        else:
            # As far from the adapted model in fp32 as the adapter alone is: two roundings of the same numbers.
            exact = own.float()(ids[:1], use_cache=False).logits[0].detach()
            assert (together[row] - exact).norm() < 1.2 * (expected - exact).norm()


def test_a_young_adapter_is_not_rounded_away_in_bf16() -> None:
    """Its change is a thousandth of the output, below bf16's 256th: on average over the outputs it is all there."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 4096, dtype=torch.bfloat16).requires_grad_(False)
    model = nn.Sequential(layer)
    A, B = torch.ones(1, 64) / 64, torch.full((4096, 1), 2e-3)
    x = torch.ones(1, 64, dtype=torch.bfloat16)
    expected = float((nn.functional.linear(x.float(), layer.weight.float(), layer.bias.float()) + 2e-3).mean())
    slots = Slots(model, 1, 1, torch.bfloat16)
    base = float(model(x).float().mean())
    slots.load(0, cast_factors({"0": LowRank(A, B, 1.0)}, torch.bfloat16))
    with slots.routed([0]):
        served = float(model(x).float().mean())
    assert abs(served - base - 2e-3) < 5e-4 and abs(served - expected) < 5e-4


def test_another_adapter_in_a_slot_leaves_nothing_of_the_first() -> None:
    model = llama()
    slots = Slots(model, 2, 8, torch.float32)
    for number in (0, 1, 2):
        slots.load(1, cast_factors(change_of(alone(number)), torch.float32))
    with slots.routed([1, 1]):
        torch.testing.assert_close(logits(model), logits(alone(2)), rtol=1e-5, atol=2e-5)
    assert torch.equal(logits(model), logits(llama()))


@pytest.mark.parametrize("method", ["adalora", "vera"])
def test_other_low_rank_methods_are_served(method: str) -> None:
    source = perturb(adapted(method))
    model = llama()
    slots = Slots(model, 1, 64, torch.float32)
    slots.load(0, cast_factors(change_of(source), torch.float32))
    with slots.routed([0, 0]):
        torch.testing.assert_close(logits(model), logits(source), rtol=1e-5, atol=2e-5)


def test_what_does_not_fit_is_named() -> None:
    slots = Slots(llama(), 1, 4, torch.float32)
    change = change_of(alone(1))
    with pytest.raises(ValueError, match="an adapter of rank 8 does not fit slots of rank 4"):
        slots.load(0, cast_factors(change, torch.float32))
    for name, says in (("model.norms", "has no linear layer"), ("lm_head", r"do not fit the model's layer of shape")):
        with pytest.raises(ValueError, match=f"{name}: .*{says}"):
            slots.load(0, {name: (torch.ones(2, 5), torch.ones(2, 6))})
    with pytest.raises(ValueError, match="there are slots 0 to 0; -1 is the base"), slots.routed([1]):
        pass
