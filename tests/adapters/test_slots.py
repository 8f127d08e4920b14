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
@pytest.mark.parametrize("guests", [False, True], ids=["slots", "guests"])
def test_row_equals_its_adapter_alone(guests: bool, quantized: bool, dtype: torch.dtype) -> None:
    model = llama(dtype, quantized)
    slots = Slots(model, count=4 if not guests else 1, rank=8, dtype=dtype)
    found = [cast_factors(change_of(alone(number, dtype, quantized)), dtype) for number in range(3)]
    numbers = [2, 0, 3] if not guests else [0, slots.welcome(found[1]), slots.welcome(found[2])]
    for slot, factors in zip(numbers, found, strict=True):
        if slot < slots.count:
            slots.load(slot, factors)
    ids = tokens(1).expand(4, -1)

    with torch.no_grad(), slots.routed([numbers[0], -1, numbers[2], numbers[1]]):
        together = model(ids, use_cache=False).logits

    for row, number in enumerate((0, None, 2, 1)):
        own = llama(dtype, quantized) if number is None else alone(number, dtype, quantized)
        expected = own(ids[:1], use_cache=False).logits[0].detach()
        if dtype is torch.float32:
            # Sums of more rows, in another order.
            torch.testing.assert_close(together[row], expected, rtol=1e-5, atol=2e-5)
        else:
            # They are as far from the adapted model in fp32 as the adapter alone is: two roundings of the same numbers.
            exact = own.float()(ids[:1], use_cache=False).logits[0].detach()
            assert (together[row] - exact).norm() < 1.2 * (expected - exact).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_step_of_slots_and_guests_is_each_adapter_alone(dtype: torch.dtype) -> None:
    """One token a row: eight rows over one slot, as the decoder asks for them."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 48, dtype=dtype).requires_grad_(False)
    pairs = [LowRank(torch.randn(2 + n, 64) / 8, torch.randn(48, 2 + n), 0.5) for n in range(3)]
    model = nn.Sequential(layer)
    slots = Slots(model, 1, 2, dtype)
    slots.load(0, cast_factors({"0": pairs[0]}, dtype))
    routes = [0, -1, *(slots.welcome(cast_factors({"0": pair}, dtype)) for pair in pairs[1:]), 0]
    x = torch.randn(5, 64, dtype=dtype)
    with torch.no_grad(), slots.routed(routes):
        together = model(x).double()
    exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    for row, pair in enumerate((pairs[0], None, *pairs[1:], pairs[0])):
        if pair is not None:
            exact[row] += 0.5 * x[row].double() @ pair.A.double().t() @ pair.B.double().t()
    # bf16: factors, inner products, changes and outputs are each rounded to 8 bits.
    assert (together - exact).abs().max() < (1e-5 if dtype is torch.float32 else 0.04) * exact.abs().max()


@pytest.mark.parametrize("slots_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("guest", [False, True], ids=["slot", "guest"])
def test_a_step_in_fp32_over_slots_in_bf16_or_a_bias_with_gaps(guest: bool, slots_dtype: torch.dtype) -> None:
    """A kernel that reads by address would take them for other numbers."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 48)
    layer.bias = nn.Parameter(torch.linspace(-9, 9, 96)[::2])
    model = nn.Sequential(layer).requires_grad_(False)
    slots = Slots(model, 1, 4, slots_dtype)
    pair = LowRank(torch.randn(4, 64) / 8, torch.randn(48, 4), 0.5)
    factors, number = cast_factors({"0": pair}, slots_dtype), 0
    if guest:
        number = slots.welcome(factors)
    else:
        slots.load(0, factors)
    x = torch.randn(3, 64)
    exact = x.double() @ (layer.weight.double() + 0.5 * pair.B.double() @ pair.A.double()).t() + layer.bias.double()
    with torch.no_grad(), slots.routed([number] * 3):
        found = model(x).double()
    # Factors of bf16, and in slots their inner products, have 8 bits.
    assert (found - exact).abs().max() < (1e-6 if slots_dtype is torch.float32 else 0.01) * exact.abs().max()


def test_numbers_of_one_adapter_that_are_not_finite_stay_in_its_rows() -> None:
    model = llama()
    slots = Slots(model, 2, 8, torch.float32)
    slots.load(0, cast_factors(change_of(alone(0)), torch.float32))
    broken = {name: (torch.full_like(A, torch.nan), B) for name, (A, B) in
              cast_factors(change_of(alone(1)), torch.float32).items()}  # fmt: skip
    slots.load(1, broken)
    with slots.routed([0, 1]):
        found = logits(model)
    assert found[0].isfinite().all() and found[1].isnan().any()


def test_a_guest_leaves() -> None:
    model = llama()
    slots = Slots(model, 1, 8, torch.float32)
    number = slots.welcome(cast_factors(change_of(alone(0)), torch.float32))
    with slots.routed([number, -1]):
        assert not torch.equal(logits(model)[0], logits(llama())[0])
    slots.dismiss(number)
    with pytest.raises(ValueError, match="there are slots 0 to 0; -1 is the base"), slots.routed([number]):
        pass
    assert number != slots.welcome(cast_factors(change_of(alone(0)), torch.float32))  # a number means one adapter


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


@pytest.mark.parametrize("guest", [False, True], ids=["slot", "guest"])
def test_factors_that_do_not_fit_a_layer_are_refused_whoever_wrapped_it(guest: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)).requires_grad_(False)
    slots = Slots(model, 1, 4, torch.float32)
    good = {"0": (torch.ones(2, 8), torch.ones(2, 16)), "1": (torch.ones(2, 16), torch.ones(2, 8))}
    put = slots.welcome if guest else lambda factors: slots.load(0, factors)
    for wrapped in (False, True):
        for A, B in (
            (torch.ones(2, 32), torch.ones(2, 8)),
            (torch.ones(2, 16), torch.ones(2, 32)),
            (torch.ones(2, 16), torch.ones(16)),
            (torch.ones(16), torch.ones(2, 8)),
            (torch.ones(4, 16), torch.ones(2, 8)),
            (torch.ones(1, 2, 16), torch.ones(1, 2, 8)),
        ):
            with pytest.raises(
                ValueError, match="1: the adapter's factors, A .* do not fit the model's layer of shape"
            ):
                put({"0": (torch.full((2, 8), 3.0), torch.ones(2, 16)), "1": (A, B)})
        assert bool(slots.layers) == wrapped and not (slots.guests and not wrapped)
        put(good)
        number = max(slots.guests, default=0)
        assert torch.equal(slots.pair(number, slots.layers["0"])[0][:2], good["0"][0])


def test_a_load_that_fails_halfway_leaves_nothing_to_the_next() -> None:
    """Three rows at once go through the columns of the slots; the second of the layers has no numbers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).bfloat16().requires_grad_(False)
    slots = Slots(model, 1, 4, torch.bfloat16)

    def pair(device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(torch.randn(4, 16, device=device, dtype=torch.bfloat16) for _ in "AB")

    for factors in ({"0": pair(), "1": pair()}, {"1": pair()}):
        slots.load(0, factors)
    with pytest.raises(NotImplementedError, match="no data"):
        slots.load(0, {"0": pair(), "1": pair("meta")})
    assert slots.layers["0"].A.any()  # this fails halfway
    slots.load(0, {"1": pair()})
    x = torch.randn(3, 16, dtype=torch.bfloat16)
    with slots.routed([0, 0, 0]):
        served = model[0](x)
    change = (served.float() - model[0].base_layer(x).float()).abs().max()
    assert change < 0.02 and not slots.layers["0"].A.any()  # two roundings of the base's numbers
