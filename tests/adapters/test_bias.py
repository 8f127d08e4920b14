"""`adapter.bias`: biases of the base that train beside A and B."""

from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from adapter_models import adapted, is_base_but_for_rounding, llama, logits, perturb, tokens
from torch import nn

from lightning_peft.adapters.bias import Bias
from lightning_peft.adapters.inject import inject_adapters, trainable_parameter_counts
from lightning_peft.adapters.lora import LoRAConfig
from lightning_peft.adapters.merge import merge_adapters
from lightning_peft.checkpoint.merge_config import MergeBase, MergeConfig
from lightning_peft.checkpoint.merged import merge
from lightning_peft.checkpoint.peft_format import adapter_config_from_peft, load_adapter, save_adapter
from lightning_peft.models.tiny import tiny_tokenizer
from lightning_peft.quantization.weights import dense_weight

QKV_BIASES, O_BIASES = 2 * (64 + 32 + 32), 2 * 64
VARIANTS = ["lora", "dora", "lora_fa"]
every_variant = pytest.mark.parametrize("method", VARIANTS)
every_base = pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
both = pytest.mark.parametrize("bias", ["all", "lora_only"])
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.mark.parametrize(("bias", "count"), [("none", 0), ("lora_only", QKV_BIASES), ("all", QKV_BIASES + O_BIASES)])
def test_count_is_that_of_the_biases_chosen(bias: str, count: int) -> None:
    targets = ["q_proj", "k_proj", "v_proj", "up_proj"]

    trained = trainable_parameter_counts(adapted("lora", bias=Bias[bias], target_modules=targets))[0]

    assert trained - trainable_parameter_counts(adapted("lora", target_modules=targets))[0] == count


@every_variant
@every_base
def test_gradients_equal_those_of_the_dense_formula(method: str, quantized: bool) -> None:
    model = perturb(adapted(method, quantized=quantized, bias=Bias.lora_only))
    layer = model.get_submodule("model.layers.1.self_attn.k_proj")
    bias = layer.base_layer.bias
    x, direction = torch.randn(3, 5, 64), torch.randn(3, 5, 32)

    dense = F.linear(x, dense_weight(layer.base_layer) + layer.delta_weight(), bias)
    (expected,) = torch.autograd.grad((dense * direction).sum(), [bias])
    (actual,) = torch.autograd.grad((layer(x) * direction).sum(), [bias])

    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@every_variant
@every_base
def test_biases_train_in_fp32_on_a_bf16_base(method: str, quantized: bool) -> None:
    model = adapted(method, torch.bfloat16, quantized, bias=Bias.lora_only)

    model(tokens(), use_cache=False).logits.float().square().mean().backward()

    biases = {name: p for name, p in model.named_parameters() if name.endswith("base_layer.bias")}
    assert len(biases) == 8 and all(p.dtype == p.grad.dtype == torch.float32 for p in biases.values())
    assert is_base_but_for_rounding(logits(model), llama(torch.bfloat16, quantized))


@every_variant
@every_base
def test_merge_carries_the_biases(method: str, quantized: bool) -> None:
    model = perturb(adapted(method, quantized=quantized, bias=Bias.all))
    expected = logits(model)

    merge_adapters(model)

    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=1e-4)


def test_merge_into_the_original_base_carries_the_biases(tmp_path: Path) -> None:
    model = perturb(adapted("lora", quantized=True, bias=Bias.lora_only))
    name = "model.layers.0.self_attn.q_proj"
    bias = model.get_submodule(name).base_layer.bias.detach().clone()

    merged = llama()
    merge(model, tiny_tokenizer(), tmp_path / "out", [tokens()], MergeConfig(9.0, base=MergeBase.original), merged)

    reloaded = type(merged).from_pretrained(tmp_path / "out")
    assert torch.equal(reloaded.get_submodule(name).bias, bias) and not torch.equal(
        llama().get_submodule(name).bias, bias
    )


@both
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_hf_peft_reads_our_biases_and_we_read_theirs(method: str, bias: str, tmp_path: Path) -> None:
    targets = ["q_proj", "v_proj"]
    ours = perturb(adapted(method, bias=Bias[bias], target_modules=targets))
    save_adapter(ours, LoRAConfig(rank=4, method=method, bias=Bias[bias]), tmp_path / "ours")

    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours", is_trainable=True).eval()
    # fp32, and the sums of DoRA in another order.
    torch.testing.assert_close(logits(theirs), logits(ours), atol=1e-4, rtol=1e-4)
    count = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert count == trainable_parameter_counts(ours)[0]
    assert theirs.peft_config["default"].bias == bias and theirs.peft_config["default"].modules_to_save is None

    perturb(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    config = adapter_config_from_peft(tmp_path / "theirs")
    again = llama()
    inject_adapters(again, config)
    load_adapter(again, tmp_path / "theirs")
    torch.testing.assert_close(logits(again), logits(theirs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("bias", "whose"), [("all", "no layer of this model"), ("lora_only", "none of the adapted layers")]
)
def test_model_without_biases_is_named(bias: str, whose: str) -> None:
    with pytest.raises(ValueError, match=f"adapter.bias={bias}: {whose} has a bias; use adapter.bias=none"):
        inject_adapters(llama(attention_bias=False), LoRAConfig(bias=Bias[bias]))


def test_bias_that_trains_rounded_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "norm": nn.LayerNorm(8)}).bfloat16()

    inject_adapters(model, LoRAConfig(rank=2, target_modules=["q_proj"], bias=Bias.all))

    assert "adapter.bias=all: 1 biases outside linear layers train in the dtype of the model" in caplog.text
    assert model["q_proj"](torch.randn(2, 8).bfloat16()).dtype == torch.bfloat16
