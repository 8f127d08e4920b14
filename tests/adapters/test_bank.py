"""Several adapters on one base: every row is what its adapter alone gives, gradients included."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from adapter_models import WRAPPING, adapted, config_for, llama, logits, perturb, tokens
from torch import Tensor, nn

from lightning_peft.adapters.bank import AdapterBank, inject_bank, routed
from lightning_peft.adapters.base import AdapterConfig
from lightning_peft.adapters.bias import Bias
from lightning_peft.adapters.inject import adapters, inject_adapters, trainable_parameter_counts
from lightning_peft.adapters.lora import LoRAConfig
from lightning_peft.checkpoint.peft_format import adapter_config_from_peft, load_adapter, save_adapter
from lightning_peft.kernels import segments
from lightning_peft.quantization.config import Kind

CONFIGS: list[AdapterConfig] = [
    LoRAConfig(rank=4),
    config_for("dora", rank=8, target_modules=["q_proj", "v_proj"]),
    LoRAConfig(rank=2, alpha=16, rank_stabilized=True),
    config_for("hira"),
]
EPSILON = 1.2e-7
"""fp32's: the base's product of more rows may add in another order."""

BF16_EPSILON = 2**-8
"""bf16's: such a sum may round to the other neighbour."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compute with one thread: several share a product by its shape, so more rows are added in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_within_epsilon(actual: Tensor, expected: Tensor, factor: float = 1) -> None:
    difference = (actual - expected).detach().abs().max()
    epsilon = EPSILON if actual.dtype is torch.float32 else BF16_EPSILON
    assert difference <= factor * epsilon * expected.detach().abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("quantized", [False, Kind.nf4, Kind.int8], ids=["dense", "nf4", "int8"])
@pytest.mark.parametrize("method", [name for name in WRAPPING if name != "ia3"])
def test_layer_equals_each_adapter_alone(method: str, quantized: bool | Kind, dtype: torch.dtype) -> None:
    models = [perturb(adapted(method, dtype, quantized), scale) for scale in (0.05, 0.02)]
    layers = [model.get_submodule("model.layers.1.self_attn.v_proj") for model in models]
    layers[1].base_layer = layers[0].base_layer
    wanted = [[p for p in model.parameters() if p.requires_grad] for model in models]
    bank = AdapterBank(layers)
    bank.routes = [1, 0, -1, 1]
    x = torch.randn(4, 5, 64, dtype=dtype, requires_grad=True)
    direction = torch.randn(4, 5, 32, dtype=dtype)

    output = bank(x)
    together = torch.autograd.grad((output * direction).sum(), [x, *wanted[0], *wanted[1]], allow_unused=True)

    rows = {0: [1], 1: [0, 3]}
    for number, layer in enumerate(layers):
        own = x[rows[number]].detach().requires_grad_()
        alone = layer(own)
        expected = torch.autograd.grad(
            (alone * direction[rows[number]]).sum(), [own, *wanted[number]], allow_unused=True
        )
        assert_within_epsilon(output[rows[number]], alone)
        start = 1 + number * len(wanted[0])
        actual = [together[0][rows[number]], *together[start : start + len(wanted[number])]]
        for left, right in zip(actual, expected, strict=True):
            assert (left is None) == (right is None)
            if right is not None:
                assert_within_epsilon(left, right, factor=4)  # sums over up to ten rows
    assert torch.equal(output[2], layers[0].base_layer(x)[2])


def alone(config: AdapterConfig, quantized: bool) -> nn.Module:
    model = llama(quantized=quantized)
    torch.manual_seed(1)
    inject_adapters(model, config)
    return perturb(model)


def bank_of(configs: Sequence[AdapterConfig], quantized: bool) -> nn.Module:
    model = llama(quantized=quantized)
    inject_bank(model, configs, lambda model, number: copy_values(model, alone(configs[number], quantized)))
    return model


@torch.no_grad()
def copy_values(model: nn.Module, source: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(source.get_parameter(name))


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
def test_model_with_mixed_methods_and_ranks_equals_each_alone(quantized: bool) -> None:
    bank = bank_of(CONFIGS, quantized)
    ids = tokens(5)
    with routed(bank, [3, 0, -1, 1, 2]):
        bank_logits = bank(ids, use_cache=False).logits
        bank_logits.square().mean((1, 2)).sum().backward()

    for row, number in enumerate([3, 0, None, 1, 2]):
        model = llama(quantized=quantized) if number is None else alone(CONFIGS[number], quantized)
        own = model(ids[row : row + 1], use_cache=False).logits
        # Two blocks of fp32 sums in another order.
        torch.testing.assert_close(bank_logits[row], own[0], atol=2e-5, rtol=1e-5)
        if number is None:
            continue
        own.square().mean((1, 2)).sum().backward()
        for name, layer in adapters(model):
            member = bank.get_submodule(name).members[str(number)]
            for key, parameter in layer.named_parameters():
                if parameter.requires_grad:
                    torch.testing.assert_close(member.get_parameter(key).grad, parameter.grad, atol=1e-5, rtol=1e-4)


def test_saved_adapters_are_served_together(tmp_path: Path) -> None:
    expected = []
    for number, config in enumerate(CONFIGS):
        model = alone(config, False)
        save_adapter(model, config, tmp_path / str(number))
        expected.append(logits(model)[0])

    folders = [tmp_path / str(number) for number in range(len(CONFIGS))]
    bank = llama()
    inject_bank(
        bank, [adapter_config_from_peft(f) for f in folders], lambda m, number: load_adapter(m, folders[number])
    )

    with torch.no_grad(), routed(bank, [0, 1, 2, 3]):
        together = bank(tokens()[:1].expand(4, -1), use_cache=False).logits
    torch.testing.assert_close(together, torch.stack(expected), atol=2e-5, rtol=1e-5)


def test_only_the_adapters_of_a_bank_train() -> None:
    counts = [trainable_parameter_counts(alone(config, False))[0] for config in CONFIGS]

    assert trainable_parameter_counts(bank_of(CONFIGS, False))[0] == sum(counts)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (config_for("vera"), "keeps state beside its layers"),
        (config_for("full", rank=None), "trains the base itself"),
        (LoRAConfig(trainable_modules=["norm"]), "trains .'norm'. of the base"),
        (LoRAConfig(bias=Bias.all), "trains biases of the base"),
        (LoRAConfig(init="olora"), "starts by rewriting the base"),
    ],
)
def test_adapter_that_changes_what_others_see_is_refused(config: AdapterConfig, reason: str) -> None:
    with pytest.raises(ValueError, match=f"adapter 1 of the bank, method {config.method}, {reason}.*: run it alone"):
        inject_bank(llama(), [LoRAConfig(), config])


def test_adapter_that_rescales_inputs_is_refused() -> None:
    with pytest.raises(ValueError, match="IA3Linear rescales the base's input"):
        inject_bank(llama(), [config_for("ia3")])


def test_adapters_around_different_layers_are_refused() -> None:
    layers = [layer for _, layer in adapters(adapted("lora"))][:2]

    with pytest.raises(ValueError, match="around one base layer"):
        AdapterBank(layers)


def test_rows_need_routes() -> None:
    bank = bank_of(CONFIGS[:2], False)

    with pytest.raises(RuntimeError, match="a batch of 2 rows needs as many routes"):
        bank(tokens(), use_cache=False)
    with pytest.raises(RuntimeError, match="a batch of 2 rows needs as many routes"), routed(bank, [0, 1, 1]):
        bank(tokens(), use_cache=False)
    with pytest.raises(ValueError, match=r"routes \[7\]: the banks hold adapters \[0, 1\]; -1 is the base"):
        with routed(bank, [0, 7]):
            pass


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_in_bf16_a_row_is_its_adapter_alone(method: str, quantized: bool) -> None:
    """A change below the rounding of the base's output is kept, as outside a bank.

    Sums in fp32 may have another order where the base's product has more rows, and a few of them round the other way.
    If the change were lost, three in ten numbers or more would be others.
    """
    models = [perturb(adapted(method, torch.bfloat16, quantized), scale) for scale in (1e-3, 2e-3)]
    layers = [model.get_submodule("model.layers.1.self_attn.v_proj") for model in models]
    layers[1].base_layer = layers[0].base_layer
    bank = AdapterBank(layers)
    bank.routes = [1, 0, 1]
    x = torch.randn(3, 40, 64, dtype=torch.bfloat16)
    output = bank(x)
    expected = torch.stack([layers[1](x[:1])[0], layers[0](x[1:2])[0], layers[1](x[2:])[0]])
    assert (output == expected).float().mean() > 0.97
    torch.testing.assert_close(output, expected, rtol=2**-7, atol=1e-6)
    with bank_without_changes(layers):
        assert (bank(x) == expected).float().mean() < 0.8


@contextmanager
def bank_without_changes(layers: Sequence[nn.Module]) -> Iterator[None]:
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def test_rows_drop_what_their_adapter_alone_drops() -> None:
    """Two rows of one adapter train beside the base's, with the generator where it stood."""
    layer = adapted("lora").train().get_submodule("model.layers.1.self_attn.v_proj")
    layer.dropout = 0.5
    bank, x = AdapterBank([layer]), torch.randn(3, 5, 64)
    bank.routes = [0, -1, 0]
    torch.manual_seed(1)
    expected, behind = layer(x[[0, 2]]), torch.rand(1)
    torch.manual_seed(1)
    output = bank(x)
    assert_within_epsilon(output[[0, 2]], expected, factor=2)  # the base's product has a row more
    assert torch.equal(output[1:2], layer.base_layer(x)[1:2]) and torch.equal(torch.rand(1), behind)


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_of_one_adapter_that_are_not_finite_stay_in_its_rows(factor: str, value: float) -> None:
    """So do the gradients that they make."""
    bank = bank_of([LoRAConfig(rank=4), LoRAConfig(rank=4)], False)
    for name, parameter in bank.named_parameters():
        if f".members.1.{factor}" in name:
            parameter.data.view(-1)[3] = value
    with routed(bank, [0, 1]):
        logits = bank(tokens(), use_cache=False).logits
    assert logits[0].isfinite().all() and logits[1].isnan().any()
    logits.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in bank.named_parameters() if ".members.0." in name}
    assert gradients and all(gradient.isfinite().all() for gradient in gradients.values())
    assert any(gradient.any() for gradient in gradients.values())


def test_low_rank_methods_share_the_product_of_their_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve rows of two adapters and the base: one product of twelve times five rows a layer."""
    bank, seen = bank_of([LoRAConfig(rank=4), config_for("lora_fa", rank=2)], False), []
    product = segments.sum_with_parts
    monkeypatch.setattr(segments, "sum_with_parts", lambda rows, *more: seen.append(len(rows)) or product(rows, *more))
    with torch.no_grad(), routed(bank, [0, 1, -1] * 4):
        bank(tokens(12), use_cache=False)
    layers = [module for module in bank.modules() if isinstance(module, AdapterBank)]
    assert seen == [12 * tokens(12).shape[1]] * len(layers)
