"""Injection, modules trained in full, merging a whole model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import WRAPPING, adapted, config_for, llama, logits, perturb, tokens
from torch import nn

from lightning_peft.adapters.base import NotMergeableError
from lightning_peft.adapters.bias import Bias
from lightning_peft.adapters.full import FullConfig
from lightning_peft.adapters.inject import (
    Injection,
    adapters,
    disable_adapters,
    inject_adapters,
    regularization,
    step_schedule,
    trainable_parameter_counts,
)
from lightning_peft.adapters.lora import LoRAConfig, LoRALinear
from lightning_peft.adapters.merge import merge_adapters
from lightning_peft.models.loading import load_by_block, load_model
from lightning_peft.models.source import ModelConfig
from lightning_peft.quantization.config import Kind, QuantizationConfig


def test_names_of_the_wrapped_layers_are_returned() -> None:
    model = llama()

    names = inject_adapters(model, LoRAConfig(rank=4, target_modules="query_value", layers="1"))

    assert names == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]
    assert [name for name, _ in adapters(model)] == names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_trainable_modules_are_fp32_and_compute_in_the_models_dtype(dtype: torch.dtype) -> None:
    model = llama(dtype)
    inject_adapters(model, LoRAConfig(rank=4, trainable_modules=["lm_head", "embed_tokens", "input_layernorm"]))
    seen: list[torch.dtype] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))

    model(tokens(), use_cache=False).logits.float().square().mean().backward()

    trained = [model.lm_head.weight, model.model.embed_tokens.weight, model.model.layers[0].input_layernorm.weight]
    assert all(p.dtype == torch.float32 and p.grad is not None for p in trained)
    assert set(seen) == {dtype}
    assert model.model.norm.weight.dtype == dtype and not model.model.norm.weight.requires_grad


def test_trainable_modules_start_as_the_model() -> None:
    model = llama(torch.bfloat16, attention_bias=False)
    expected = logits(model)

    inject_adapters(model, LoRAConfig(rank=4, trainable_modules=["embed_tokens"]))

    assert torch.equal(logits(model), expected)


def test_tied_weight_trains_as_one() -> None:
    model = llama(torch.bfloat16, tie_word_embeddings=True)

    inject_adapters(model, LoRAConfig(rank=4, trainable_modules=["lm_head", "embed_tokens"]))

    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.float32 and logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainable_modules": ["lm_hed"]}, "adapter.trainable_modules: lm_hed matches no module; nearest: lm_head"),
        ({"trainable_modules": ["q_proj"]}, "q_proj is among adapter.target_modules too"),
        ({"trainable_modules": ["mlp"]}, "mlp is among adapter.target_modules too"),
    ],
)
def test_bad_trainable_modules_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inject_adapters(llama(), LoRAConfig(rank=4, **options))


def test_one_of_two_tied_modules_is_refused() -> None:
    with pytest.raises(ValueError, match="ties model.embed_tokens and lm_head; name both or neither"):
        inject_adapters(llama(tie_word_embeddings=True), LoRAConfig(rank=4, trainable_modules=["lm_head"]))


def test_quantised_module_cannot_train_in_full() -> None:
    options = {"target_modules": "query_value", "trainable_modules": ["down_proj"]}

    with pytest.raises(ValueError, match="down_proj is quantised and cannot be trained in full"):
        inject_adapters(llama(quantized=True), LoRAConfig(rank=4, **options))


def test_refused_injection_leaves_the_model_alone() -> None:
    model = llama()

    with pytest.raises(ValueError):
        inject_adapters(model, LoRAConfig(rank=4, trainable_modules=["nothing"]))

    assert not list(adapters(model)) and all(p.requires_grad for p in model.parameters())


def test_full_leaves_every_weight_trainable() -> None:
    model = llama()

    assert inject_adapters(model, FullConfig()) == []
    assert len(set(trainable_parameter_counts(model))) == 1


def test_full_refuses_codes() -> None:
    with pytest.raises(ValueError, match="method=full cannot train the quantised weight of .*: use quantization=none"):
        inject_adapters(llama(quantized=True), FullConfig())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": "attention"}, "adapter.target_modules='attention': method full trains every weight"),
        ({"rank": 8}, "adapter.rank=8: method 'full' has no rank; use rank=none"),
        ({"alpha": 8.0}, "adapter.alpha=8.0: method 'full' has no scaling"),
        ({"layers": "0-3"}, "adapter.layers='0-3': method full trains every weight"),
    ],
)
def test_full_refuses_what_it_cannot_do(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FullConfig(**options)


@pytest.mark.parametrize("method", ["ia3", "intrinsic"])
def test_rankless_methods_refuse_a_rank(method: str) -> None:
    with pytest.raises(ValueError, match="has no rank; use rank=none"):
        config_for(method, rank=8)


@pytest.mark.parametrize("method", ["vera", "miss", "hira", "ia3", "intrinsic"])
def test_methods_without_scaling_refuse_alpha(method: str) -> None:
    with pytest.raises(ValueError, match="has no scaling; leave it null"):
        config_for(method, alpha=8.0)


def test_adapters_are_enabled_again_after_an_error() -> None:
    model = perturb(adapted("lora"))
    expected = logits(model)

    with pytest.raises(KeyError), disable_adapters(model):
        raise KeyError

    assert torch.equal(logits(model), expected)


def test_merge_of_a_model_with_one_unmergeable_layer_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = perturb(adapted("lora"))
    expected = logits(model)
    last = list(adapters(model))[-1][1]
    monkeypatch.setattr(last, "mergeable", False, raising=False)

    with pytest.raises(NotMergeableError, match="LoRALinear cannot be merged"):
        merge_adapters(model)

    assert torch.equal(logits(model), expected) and len(list(adapters(model))) == 14


def test_merged_model_has_the_names_of_the_base() -> None:
    model = perturb(adapted("vera"))

    merge_adapters(model)

    assert model.state_dict().keys() == llama().state_dict().keys()


def test_embeddings_can_be_adapted_and_merged() -> None:
    model = perturb(adapted("lora", target_modules=["embed_tokens", "lm_head", "q_proj"]))
    expected = logits(model)

    merge_adapters(model)

    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=1e-4)


def test_methods_without_extra_loss_or_schedule_have_none() -> None:
    model = adapted("lora")

    assert regularization(model) is None and step_schedule(model, LoRAConfig(), 10) is None


def test_adapted_layers_stand_where_their_base_stood() -> None:
    model = adapted("lora")

    layer = model.get_submodule("model.layers.0.mlp.up_proj")

    assert isinstance(layer, LoRALinear) and isinstance(layer.base_layer, nn.Linear)
    assert "model.layers.0.mlp.up_proj.base_layer.weight" in model.state_dict()


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *((method, {}) for method in [*WRAPPING, "full"]),
    ("lora", {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    ("lora", {"trainable_modules": ["norm", "post_attention_layernorm", "layers.1.input_layernorm"]}),
    ("lora", {"bias": Bias.all, "target_modules": ["up_proj"], "layers": "1"}),
]


@pytest.mark.parametrize(
    ("method", "options", "kind"),
    [(*case, kind) for case in OPTIONS for kind in (Kind.none, Kind.nf4) if (case[0], kind) != ("full", Kind.nf4)],
)
def test_blocks_adapted_as_they_arrive_equal_all_adapted_at_once(
    method: str, options: dict[str, Any], kind: Kind, tmp_path: Path
) -> None:
    llama(torch.bfloat16).save_pretrained(tmp_path)
    source, quantization = ModelConfig("hf", str(tmp_path)), QuantizationConfig(kind)
    config = FullConfig() if method == "full" else config_for(method, **options)
    whole = load_model(source, torch.bfloat16, quantization)
    torch.manual_seed(1)
    names = inject_adapters(whole, config)

    model, blocks = load_by_block(source, torch.bfloat16, quantization)
    torch.manual_seed(1)
    injection = Injection(model, config)
    for name in blocks:
        injection.adapt(name)
        assert not any(parameter.is_meta for parameter in model.get_submodule(name).parameters())
    injection.finish()

    assert [target.name for target in injection.targets] == names
    tensors, expected = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (model, whole))
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype, name
        assert tensors[name].requires_grad == tensor.requires_grad, name
    assert torch.equal(logits(model), logits(whole))
