"""Adapters in slots: every row is what its adapter alone gives, in bf16 and on 4-bit bases too."""

import pytest
import torch
from adapter_models import adapted, llama, logits, perturb, tokens
from torch import nn

from lightning_peft.adapters.base import LowRank
from lightning_peft.adapters.inject import adapters, inject_adapters
from lightning_peft.adapters.lora import LoRAConfig
from lightning_peft.adapters.slots import Slots, cast_factors
from lightning_peft.inference.static_steps import StaticSteps
from lightning_peft.kernels.native.library import without_kernels

CONFIGS = [
    LoRAConfig(rank=4),
    LoRAConfig(rank=8, alpha=3.0, target_modules=["q_proj", "v_proj"]),
    LoRAConfig(rank=2, alpha=16, rank_stabilized=True, target_modules=["mlp"]),
]


on_host_or_copied = pytest.mark.parametrize("on_host", [True, False], ids=["on host", "copied"])


def alone(number: int, dtype: torch.dtype = torch.float32, quantized: bool = False) -> nn.Module:
    model = llama(dtype, quantized)
    torch.manual_seed(number)
    inject_adapters(model, CONFIGS[number])
    return perturb(model, 0.05 + 0.02 * number)


def change_of(model: nn.Module) -> dict[str, LowRank]:
    return {name: change for name, layer in adapters(model) if (change := layer.low_rank()) is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
@on_host_or_copied
def test_row_equals_its_adapter_alone(on_host: bool, quantized: bool, dtype: torch.dtype) -> None:
    model = llama(dtype, quantized)
    slots = Slots(model, 4, 8, dtype, on_host)
    found = [cast_factors(change_of(alone(number, dtype, quantized)), dtype) for number in range(3)]
    numbers = [2, 0, 11 if on_host else 3]
    for slot, factors in zip(numbers, found, strict=True):
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


@pytest.mark.parametrize("each", [None, 1, 7, 64], ids=["a step", "one token", "7 tokens", "64 tokens"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@on_host_or_copied
def test_rows_of_several_ranks_are_each_adapter_alone(on_host: bool, dtype: torch.dtype, each: int | None) -> None:
    """A token a row is what a step has, and several are what prompts have."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 48, dtype=dtype).requires_grad_(False)
    pairs = [LowRank(torch.randn(2 + n, 64) / 8, torch.randn(48, 2 + n), 0.5) for n in range(3)]
    model = nn.Sequential(layer)
    slots = Slots(model, 3, 4, dtype, on_host)
    for slot, pair in enumerate(pairs):
        slots.load(slot, cast_factors({"0": pair}, dtype))
    x = torch.randn(5, *(() if each is None else (each,)), 64, dtype=dtype)
    with torch.no_grad(), slots.routed([0, -1, 1, 2, 0]):
        together = model(x).double()
    exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    for row, pair in enumerate((pairs[0], None, *pairs[1:], pairs[0])):
        if pair is not None:
            exact[row] += 0.5 * x[row].double() @ pair.A.double().t() @ pair.B.double().t()
    # bf16: factors, inner products, changes and outputs are each rounded to 8 bits.
    assert (together - exact).abs().max() < (1e-5 if dtype is torch.float32 else 0.04) * exact.abs().max()


@pytest.mark.parametrize("slots_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@on_host_or_copied
def test_a_step_in_fp32_over_slots_in_bf16_or_a_bias_with_gaps(on_host: bool, slots_dtype: torch.dtype) -> None:
    """A kernel that reads by address would take them for other numbers."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 48)
    layer.bias = nn.Parameter(torch.linspace(-9, 9, 96)[::2])
    model = nn.Sequential(layer).requires_grad_(False)
    slots = Slots(model, 1, 4, slots_dtype, on_host)
    pair = LowRank(torch.randn(4, 64) / 8, torch.randn(48, 4), 0.5)
    slots.load(0, cast_factors({"0": pair}, slots_dtype))
    x = torch.randn(3, 64)
    exact = x.double() @ (layer.weight.double() + 0.5 * pair.B.double() @ pair.A.double()).t() + layer.bias.double()
    with torch.no_grad(), slots.routed([0] * 3):
        found = model(x).double()
    # Factors of bf16, and their inner products, have 8 bits.
    assert (found - exact).abs().max() < (1e-6 if slots_dtype is torch.float32 else 0.01) * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@on_host_or_copied
def test_numbers_of_one_adapter_that_are_not_finite_stay_in_its_rows(on_host: bool, dtype: torch.dtype) -> None:
    model = llama(dtype)
    slots = Slots(model, 2, 8, dtype, on_host)
    slots.load(0, cast_factors(change_of(alone(0, dtype)), dtype))
    broken = {name: (torch.full_like(A, torch.nan), B) for name, (A, B) in
              cast_factors(change_of(alone(1, dtype)), dtype).items()}  # fmt: skip
    slots.load(1, broken)
    with slots.routed([0, 1]):
        found = logits(model)
    assert found[0].isfinite().all() and found[1].isnan().any()


def test_an_adapter_leaves_its_slot() -> None:
    model = llama()
    slots = Slots(model, 1, 8, torch.float32, on_host=True)
    slots.load(5, cast_factors(change_of(alone(0)), torch.float32))
    with slots.routed([5, -1]):
        assert not torch.equal(logits(model)[0], logits(llama())[0])
    slots.unload(5)
    with pytest.raises(ValueError, match="there are slots 0 to 0; -1 is the base"), slots.routed([5]):
        pass
    slots.load(5, cast_factors(change_of(alone(1)), torch.float32))
    with slots.routed([5, -1]):
        torch.testing.assert_close(logits(model)[0], logits(alone(1))[0], rtol=1e-5, atol=2e-5)


def test_slots_of_another_model_check_an_adapter_anew() -> None:
    factors = cast_factors(change_of(alone(0)), torch.float32)
    Slots(llama(), 1, 8, torch.float32, on_host=True).load(0, factors)
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="the model has no linear layer of that name"):
        Slots(model, 1, 8, torch.float32, on_host=True).load(0, factors)
    model = llama()
    slots = Slots(model, 1, 8, torch.float32, on_host=True)
    for slot in (0, 3):  # the second time without a check
        slots.load(slot, factors)
        with slots.routed([slot, -1]):
            torch.testing.assert_close(logits(model)[0], logits(alone(0))[0], rtol=1e-5, atol=2e-5)


def test_steps_follow_layers_that_were_given_back_and_others_that_came() -> None:
    """Two adapters of as many layers, one after the other: the steps' layers are the second's."""
    model = llama()
    slots = Slots(model, 1, 8, torch.float32, on_host=True)
    steps = StaticSteps(model, slots)
    ids = tokens(1)[0, :6].tolist()
    for kept in ("q_proj", "o_proj"):
        source = alone(0)
        change = {name: part for name, part in change_of(source).items() if name.endswith(kept)}
        for name, layer in adapters(source):
            layer.enabled = name.endswith(kept)
        slots.load(0, cast_factors(change, torch.float32))
        with torch.inference_mode():
            steps.begin([ids[:-1]], [0])
            found = steps.step(ids[-1:], [0])[0]
            steps.keep([])
        expected = source(torch.tensor([ids]), use_cache=False).logits[0, -1]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
        slots.take_back(0, 0)


def test_adapters_of_other_layers_come_one_after_the_other() -> None:
    """The layers of the second are unknown when the first is loaded."""
    model = llama()
    slots = Slots(model, 3, 8, torch.float32, on_host=True)
    for slot, number in enumerate((1, 2, 0)):
        slots.load(slot, cast_factors(change_of(alone(number)), torch.float32))
        ids = tokens(1)[:, :1].expand(2, -1)
        with torch.no_grad(), slots.routed([slot, 0]):
            found = model(ids, use_cache=False).logits
            for row, expected in enumerate((alone(number), alone(1))):
                own = expected(ids[:1], use_cache=False).logits[0]
                torch.testing.assert_close(found[row], own, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("shape", [(1,), (1, 3), (200, 1)], ids=["a step", "a prompt", "many"])
@on_host_or_copied
def test_a_young_adapter_is_not_rounded_away_in_bf16(on_host: bool, shape: tuple[int, ...]) -> None:
    """Its change is a thousandth of the output, below bf16's 256th: on average over the outputs it is all there."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 4096, dtype=torch.bfloat16).requires_grad_(False)
    model = nn.Sequential(layer)
    A, B = torch.ones(1, 64) / 64, torch.full((4096, 1), 2e-3)
    x = torch.ones(*shape, 64, dtype=torch.bfloat16)
    expected = float((nn.functional.linear(x.float(), layer.weight.float(), layer.bias.float()) + 2e-3).mean())
    slots = Slots(model, 1, 1, torch.bfloat16, on_host)
    base = float(model(x).float().mean())
    slots.load(0, cast_factors({"0": LowRank(A, B, 1.0)}, torch.bfloat16))
    with torch.no_grad(), slots.routed([0] * len(x)):
        served = float(model(x).float().mean())
    assert abs(served - base - 2e-3) < 5e-4 and abs(served - expected) < 5e-4


@on_host_or_copied
def test_another_adapter_in_a_slot_leaves_nothing_of_the_first(on_host: bool) -> None:
    model = llama()
    slots = Slots(model, 2, 8, torch.float32, on_host)
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


@on_host_or_copied
def test_what_does_not_fit_is_named(on_host: bool) -> None:
    slots = Slots(llama(), 1, 4, torch.float32, on_host)
    change = change_of(alone(1))
    with pytest.raises(ValueError, match="an adapter of rank 8 does not fit slots of rank 4"):
        slots.load(0, cast_factors(change, torch.float32))
    for name, says in (("model.norms", "has no linear layer"), ("lm_head", r"do not fit the model's layer of shape")):
        with pytest.raises(ValueError, match=f"{name}: .*{says}"):
            slots.load(0, {name: (torch.ones(2, 5), torch.ones(2, 6))})
    with pytest.raises(ValueError, match="there are slots 0 to 0; -1 is the base"), slots.routed([1]):
        pass


@on_host_or_copied
def test_factors_that_do_not_fit_a_layer_are_refused_whoever_wrapped_it(on_host: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)).requires_grad_(False)
    slots = Slots(model, 1, 4, torch.float32, on_host)
    good = {"0": (torch.ones(2, 8), torch.ones(2, 16)), "1": (torch.ones(2, 16), torch.ones(2, 8))}
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
                slots.load(0, {"0": (torch.full((2, 8), 3.0), torch.ones(2, 16)), "1": (A, B)})
        assert bool(slots.layers) == wrapped and not (slots.held and not wrapped)
        slots.load(0, good)
        assert torch.equal(slots.pair(0, slots.layers["0"])[0][:2], good["0"][0])


def test_a_load_that_fails_halfway_leaves_nothing_to_the_next() -> None:
    """Three rows at once go through the columns of the slots; the second of the layers has no numbers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).bfloat16().requires_grad_(False)
    slots = Slots(model, 1, 4, torch.bfloat16, on_host=False)

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_factors_are_scaled_before_they_are_rounded_by_kernel_and_torch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    sizes = [(8, 576, 192, 2.0), (1, 1, 1, 0.3), (7, 33, 15, -1.7), (16, 48, 576, 1 / 3), (3, 17, 100, 0.1)]
    change = {
        str(n): LowRank(torch.randn(r, width), torch.randn(out, r), scaling)
        for n, (r, width, out, scaling) in enumerate(sizes)
    }
    found = cast_factors(change, dtype)
    with without_kernels():
        assert all(map(torch.equal, *(sum(x.values(), ()) for x in (found, cast_factors(change, dtype)))))
    for name, (A, B) in found.items():
        assert torch.equal(A, (change[name].A * change[name].scaling).to(dtype)) and A.is_contiguous()
        assert torch.equal(B, change[name].B.t().to(dtype)) and B.is_contiguous()
