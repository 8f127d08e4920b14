"""LoRA on the stacked experts of a mixture, against the formula written out and against whole weights."""

import io
import logging
from typing import Any

import pytest
import torch
from families import small_model
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.adapters.base import AdapterConfig
from lightning_peft.adapters.dora import DoRAConfig, DoRAExperts, DoRALinear
from lightning_peft.adapters.inject import adapters, describe_targets, disable_adapters, inject_adapters
from lightning_peft.adapters.lora import LoRAConfig, LoRAExperts
from lightning_peft.adapters.merge import merge_adapters
from lightning_peft.adapters.registry import METHODS
from lightning_peft.adapters.targets import find_targets
from lightning_peft.kernels.grouped import RowsPerExpert, product_at_once, runs_at_once
from lightning_peft.models.forwards import keep_outputs
from lightning_peft.quantization.config import Kind, QuantizationConfig
from lightning_peft.quantization.experts import close_experts, expert_stacks, open_experts
from lightning_peft.quantization.linear import CodedWeight
from lightning_peft.quantization.quantize import dequantized_layer, quantize_linears
from lightning_peft.quantization.weights import dense_weight
from lightning_peft.training.activation_checkpointing import checkpoint_blocks
from lightning_peft.training.config import ActivationCheckpointing

FAMILIES = [
    "qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "glm4_moe", "llama4_text", "granitemoe", "phimoe", "lfm2_moe",
    "ernie4_5_moe", "minimax_m2",
]  # fmt: skip
"""Families: biases and transposed matrices, shared experts, one expert a token, tied embeddings, gates of their own."""


def exact_model(family: str) -> Any:
    """Return a small model in fp64 whose experts transformers computes one by one."""
    model = small_model(family).double()
    model.config._experts_implementation = "eager"
    keep_outputs(model)
    return model


def adapted(family: str, method: str = "lora", **options: Any) -> Any:
    model = exact_model(family)
    torch.manual_seed(1)
    inject_adapters(model, METHODS[method].config(**{"rank": 4, "experts": 3, **options}))
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.double() + 0.1 * torch.randn(parameter.shape, generator=generator).double()
    return model


def tokens() -> Tensor:
    return torch.randint(3, 90, (2, 13), generator=torch.Generator().manual_seed(3))


def logits(model: nn.Module) -> Tensor:
    return model(tokens(), use_cache=False).logits


def whole(model: Any, family: str) -> tuple[Any, dict[str, Tensor]]:
    """Return the plain model with s B_e A_e added to every matrix, and the sums added, by layer, as leaves."""
    plain, factors = exact_model(family), {}
    for name, layer in adapters(model):
        stacked = isinstance(layer, LoRAExperts)
        A, B = (f if stacked else f.weight for f in (layer.lora_A, layer.lora_B))
        A, B = (f.detach().clone().requires_grad_() for f in (A, B))
        factors |= {f"{name}.lora_A": A, f"{name}.lora_B": B}
        change = layer.scaling * (B @ A)
        if isinstance(layer, DoRALinear | DoRAExperts):
            magnitude = layer.lora_magnitude_vector.detach().clone().requires_grad_()
            factors[f"{name}.lora_magnitude_vector"] = magnitude
            base = dense_weight(layer.base_layer)
            # A constant in the backward pass, section 4.3; taken in fp32, so compared here and the same from here on.
            norms = layer.weight_norms().detach().double()
            torch.testing.assert_close(norms, (base + change).detach().norm(dim=-1), rtol=1e-6, atol=0)
            change = (magnitude / norms)[..., None] * (base + change) - base
        holder, _, leaf = name.rpartition(".")
        module = plain.get_submodule(holder) if stacked else plain.get_submodule(name)
        leaf = leaf if stacked else "weight"
        weight = module._parameters.pop(leaf).detach()
        setattr(module, leaf, weight + (change.mT if stacked and layer.base_layer.transposed else change))
    return plain, factors


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_opened_experts_compute_what_transformers_does(family: str) -> None:
    model = exact_model(family)
    with torch.no_grad():
        before = logits(model)
        names = set(model.state_dict())
        open_experts(model, [name for name, stack in expert_stacks(model).items() if stack.opens])
        opened = logits(model)
        close_experts(model)
        closed = logits(model)

    torch.testing.assert_close(opened, before, rtol=0, atol=1e-12)  # fp64, sums in another order
    assert torch.equal(closed, before) and set(model.state_dict()) == names


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_whole_weights(family: str, shared: bool, method: str) -> None:
    model = adapted(family, method, experts_share_A=shared)
    stacks = [layer for _, layer in adapters(model) if isinstance(layer, LoRAExperts)]
    assert all(len(layer.lora_A) == (1 if shared else len(layer.lora_B)) for layer in stacks)
    plain, factors = whole(model, family)
    assert any(isinstance(layer, LoRAExperts) for _, layer in adapters(model))

    outputs = [logits(model), logits(plain)]
    for output in outputs:
        F.cross_entropy(output.flatten(0, 1), tokens().flatten()).backward()

    # fp64, but for the parts of a model that compute in fp32 themselves.
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-6 * float(outputs[1].abs().max()))
    for name, expected in factors.items():
        parameters = dict(model.named_parameters())
        got = parameters.get(name, parameters.get(f"{name}.weight"))
        # The norms of DoRA are taken in fp32.
        atol = 1e-9 if method == "lora" else 1e-5 * float(expected.grad.abs().max())
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-5, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def test_an_expert_layer_is_the_loop_over_its_experts() -> None:
    layer = next(layer for _, layer in adapters(adapted("gpt_oss")) if isinstance(layer, LoRAExperts))
    experts, out_features, in_features = layer.base_layer.shape
    sizes = [3, 0, 5, 1]
    x = torch.randn(sum(sizes), in_features, dtype=torch.float64, requires_grad=True)

    rows, expected = x.split(sizes), []
    for expert in range(experts):
        W = layer.base_layer.matrices()[expert]
        change = layer.scaling * layer.lora_B[expert] @ layer.lora_A[expert]
        expected.append(rows[expert] @ (W + change).t())

    torch.testing.assert_close(layer(x, sizes), torch.cat(expected), rtol=0, atol=1e-12)
    assert layer(x[:0], [0] * experts).shape == (0, out_features)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_torchs_grouped_products_are_the_loop(family: str, dtype: torch.dtype) -> None:
    """A rank that is no multiple of eight, an expert without rows, and a stack that lies the other way round."""
    layer = next(layer for _, layer in adapters(adapted(family).float()) if isinstance(layer, LoRAExperts))
    stack = layer.base_layer.matrices().to(dtype)
    layer.base_layer.weight.data = layer.base_layer.weight.data.to(dtype)
    ids = torch.tensor([0, 0, 2, 3, 3, 3, 3, 2, 0]).sort().values
    rows = RowsPerExpert(ids, 4)
    assert list(rows) == [3, 0, 2, 4] and rows.ends.tolist() == [3, 3, 5, 9] and rows.ends.dtype is torch.int32
    x, direction = (torch.randn(9, size).to(dtype) for size in (stack.shape[2], stack.shape[1]))
    factors = (layer.lora_A, layer.lora_B)

    found = []
    for way in (lambda x: layer(x, rows), lambda x: product_at_once(x, rows.ends, stack, factors, layer.scaling)):
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        output = way(leaf)
        output.backward(direction)
        found.append((output.detach(), leaf.grad, *(factor.grad.clone() for factor in factors)))

    # bf16: three roundings of sums that the loop takes in one product.
    tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-5
    for got, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got.float(), expected.float(), rtol=0, atol=tolerance * float(expected.abs().max()))
    assert not found[1][2][1].any() and not runs_at_once(x, stack, dtype)


@pytest.mark.parametrize("mode", ["elementwise", "selective", "blocks"])
def test_recomputation_gives_the_same_gradients(mode: str) -> None:
    gradients = []
    for recomputed in (False, True):
        model = adapted("qwen3_moe", dropout=0.1).float().train()
        if recomputed:
            checkpoint_blocks(model, ActivationCheckpointing[mode])
        torch.manual_seed(5)
        F.cross_entropy(logits(model).flatten(0, 1), tokens().flatten()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})

    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("family", ["gpt_oss", "mixtral", "llama4_text"])
def test_merged_experts_are_the_adapted_ones(family: str, method: str) -> None:
    model = adapted(family, method).float()
    with torch.no_grad():
        expected = logits(model)
        merged = merge_adapters(model)
        got = logits(merged)

    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)  # fp32 sums of another order
    assert set(merged.state_dict()) == set(small_model(family).state_dict())


def test_the_base_is_back_while_adapters_are_off() -> None:
    model = adapted("qwen3_moe")
    with torch.no_grad(), disable_adapters(model):
        torch.testing.assert_close(logits(model), logits(exact_model("qwen3_moe")), rtol=0, atol=1e-12)


def test_routers_stay_frozen() -> None:
    model = adapted("qwen3_moe")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)


def found(model: nn.Module, config: AdapterConfig) -> dict[str, Any]:
    return {target.name: target for target in find_targets(model, config, tuple(METHODS[config.method].layers))}


def test_experts_are_left_alone_with_the_share_and_the_growth(caplog: pytest.LogCaptureFixture) -> None:
    model = small_model("mixtral")
    with caplog.at_level(logging.INFO):
        targets = found(model, LoRAConfig(rank=4))
    # Two blocks: q 64 x 64, k and v 32 x 64, o 64 x 64; four experts of 192 x 64 and 64 x 96.
    attention, experts = 2 * (2 * 64 * 64 + 2 * 32 * 64), 2 * 4 * (192 * 64 + 64 * 96)
    before = 2 * 4 * (2 * 128 + 2 * 96)
    after = before + 2 * 4 * 2 * (192 + 64 + 64 + 96)
    assert all(target.experts == 0 for target in targets.values())
    assert f"{100 * experts / (experts + attention):.1f} % of the linear weights are in stacked experts" in caplog.text
    assert f"adapter.experts=auto would adapt them at rank 2, and the adapter would grow from {before:,}" in caplog.text
    assert f"to {after:,} parameters" in caplog.text


@pytest.mark.parametrize(("experts", "rank"), [("auto", 2), (5, 5)])
def test_experts_have_a_rank_of_their_own(experts: Any, rank: int) -> None:
    targets = found(small_model("mixtral"), LoRAConfig(rank=4, experts=experts, target_modules="query_value"))
    stacks = {name: target.rank for name, target in targets.items() if target.experts}
    assert set(stacks) == {f"model.layers.{i}.mlp.experts.{p}" for i in (0, 1) for p in ("gate_up_proj", "down_proj")}
    assert set(stacks.values()) == {rank}
    assert {target.rank for target in targets.values() if not target.experts} == {4}


def test_patterns_layers_and_exclusions_hold_for_experts() -> None:
    config = LoRAConfig(
        rank=4, experts="auto", layers="1", exclude_modules=["gate_up_proj"], rank_pattern={"experts.down_proj": 7}
    )
    stacks = {name: target.rank for name, target in found(small_model("mixtral"), config).items() if target.experts}
    assert stacks == {"model.layers.1.mlp.experts.down_proj": 7}


def test_a_name_that_is_only_theirs_selects_experts() -> None:
    targets = found(small_model("mixtral"), LoRAConfig(rank=4, target_modules=["q_proj", "experts.down_proj"]))
    assert {name.rpartition(".")[2] for name in targets} == {"q_proj", "down_proj"}
    assert all(target.rank == 4 for target in targets.values())


@pytest.mark.parametrize("value", [0, -1, "all", 2.5, True])
def test_other_ranks_for_experts_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=f"adapter.experts={value}: must be none, auto or a rank of at least 1"):
        LoRAConfig(experts=value)


@pytest.mark.parametrize("method", ["vera", "adalora", "lora_fa", "miss", "ia3"])
def test_methods_without_a_form_for_experts_say_so(method: str) -> None:
    config = METHODS[method].config(experts=2, **({} if METHODS[method].config.uses_rank else {"rank": None}))
    with pytest.raises(
        ValueError, match=f"method {method} has no form for stacked experts; use method=lora, rslora or dora"
    ):
        found(small_model("mixtral"), config)


def test_a_model_without_experts_says_so() -> None:
    with pytest.raises(ValueError, match="adapter.experts=auto: this model has no experts"):
        found(small_model("llama"), LoRAConfig(experts="auto"))


def test_experts_of_another_computation_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="input_linear.weight is multiplied by code of its own, which no adapter"):
        found(small_model("jetmoe"), LoRAConfig(experts=4))


@pytest.mark.parametrize(("family", "options"), [("mixtral", {}), ("llama", {}), ("mixtral", {"experts": "none"})])
def test_an_A_to_share_without_experts_is_refused(family: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="experts_share_A=true: no expert is adapted; give adapter.experts=auto"):
        found(small_model(family), LoRAConfig(experts_share_A=True, **options))


def test_what_a_shared_A_spares_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    for shared in (False, True):
        model = small_model("mixtral")
        with caplog.at_level(logging.INFO):
            inject_adapters(model, LoRAConfig(rank=4, experts=2, experts_share_A=shared))
        stacks = [layer for _, layer in adapters(model) if isinstance(layer, LoRAExperts)]
        held = sum(p.numel() for layer in stacks for p in (layer.lora_A, layer.lora_B))
        assert f"are adapted at rank 2: {held:,} of the adapter's" in caplog.messages[-1]


def test_starts_that_read_the_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="adapter.init=pissa is not defined for stacked experts"):
        inject_adapters(small_model("mixtral"), LoRAConfig(rank=4, experts=2, init="pissa"))


def test_the_table_lists_experts_and_their_share() -> None:
    model, config = small_model("mixtral"), LoRAConfig(rank=4, experts=2)
    targets = find_targets(model, config, tuple(METHODS["lora"].layers))
    inject_adapters(model, config)
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(describe_targets(targets, model))
    lines = console.export_text().splitlines()
    (row,) = [line for line in lines if "experts.gate_up_proj" in line]
    assert "4 x 192 x 64" in row and "4,096" in row  # 2 blocks x 4 experts x rank 2 x (192 + 64)
    (share,) = [line for line in lines if "experts, adapted" in line]
    assert "85.7%" in share and "6,656" in share  # 147,456 of 172,032 weights


@pytest.mark.parametrize("coded", [False, True], ids=["dense", "nf4"])
def test_dora_of_experts_starts_as_its_base_and_keeps_norms_apart(coded: bool) -> None:
    """Over coded weights the layer is the one over the dense weights that the codes stand for."""
    models = [small_model("mixtral") for _ in range(2)]
    for model in models:
        quantize_linears(model, QuantizationConfig(Kind.nf4, block_size=32))
    if not coded:
        for name, layer in list(models[0].named_modules()):
            if isinstance(layer, CodedWeight):
                models[0].set_submodule(name, dequantized_layer(layer))
    base = logits(models[0])
    layers = []
    for model in models:
        torch.manual_seed(1)
        inject_adapters(model, DoRAConfig(rank=4, experts=3, target_modules=["experts.down_proj"]))
        assert torch.allclose(logits(model), base, rtol=0, atol=1e-5)
        (layer, _) = [layer for _, layer in adapters(model)]
        with torch.no_grad():
            torch.manual_seed(2)
            for parameter in layer.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn(parameter.shape))
        layers.append(layer)
    x = torch.randn(9, layers[0].lora_A.shape[2])
    sizes = [4, 0, 2, 3]
    for layer in layers:
        rows = []
        for expert, own in enumerate(x.split(sizes)):
            changed = layer.base_layer.matrix(expert) + layer.scaling * layer.lora_B[expert] @ layer.lora_A[expert]
            rows.append(own @ (layer.lora_magnitude_vector[expert, :, None] * F.normalize(changed, dim=1)).t())
        torch.testing.assert_close(layer(x, sizes), torch.cat(rows), rtol=0, atol=1e-4)
        ids = torch.arange(4).repeat_interleave(torch.tensor(sizes))
        torch.testing.assert_close(layer(x, RowsPerExpert(ids, 4)), torch.cat(rows), rtol=0, atol=1e-4)
    torch.testing.assert_close(layers[0](x, sizes), layers[1](x, sizes), rtol=0, atol=1e-5)
