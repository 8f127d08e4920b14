"""Merged folders: plain models that equal the adapted one, with a receipt that tells the truth."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from lightning_peft.adapters.base import Adapter, AdapterConfig, NotMergeableError
from lightning_peft.adapters.dora import DoRAConfig
from lightning_peft.adapters.ia3 import IA3Config
from lightning_peft.adapters.inject import adapters, inject_adapters
from lightning_peft.adapters.lora import LoRAConfig
from lightning_peft.adapters.vera import VeRAConfig
from lightning_peft.checkpoint.merge_config import MergeBase, MergeConfig
from lightning_peft.checkpoint.merged import MergeError, Receipt, merge, save_model
from lightning_peft.models.tiny import tiny_model, tiny_tokenizer
from lightning_peft.quantization.config import Kind, QuantizationConfig
from lightning_peft.quantization.quantize import quantize_linears

SAMPLES = list(torch.randint(0, 300, (3, 2, 20), generator=torch.Generator().manual_seed(4)))
NF4 = QuantizationConfig(kind=Kind.nf4)


def move(model: nn.Module, amount: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(amount * torch.randn(parameter.shape, generator=generator))


def adapted(
    config: AdapterConfig,
    model: PreTrainedModel | None = None,
    quantization: QuantizationConfig | None = None,
    amount: float = 0.05,
) -> PreTrainedModel:
    model = tiny_model() if model is None else model
    if quantization is not None:
        quantize_linears(model, quantization)
    inject_adapters(model, config)
    move(model, amount)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return torch.cat([model(input_ids=sample).logits.float() for sample in SAMPLES])


def reload(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


CONFIGS: dict[str, AdapterConfig] = {
    "lora": LoRAConfig(rank=4),
    "rslora": LoRAConfig(rank=4, alpha=9, rank_stabilized=True),
    "two_layers": LoRAConfig(rank=4, target_modules=["q_proj"], layers="1"),
    "embedding_and_head": LoRAConfig(rank=4, target_modules=["embed_tokens", "lm_head"]),
    "trained_modules": LoRAConfig(rank=4, trainable_modules=["lm_head", "norm"]),
    "pissa": LoRAConfig(rank=4, init="pissa"),
    "dora": DoRAConfig(rank=4),
    "vera": VeRAConfig(rank=8),
    "ia3": IA3Config(),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_merged_folder_equals_the_adapted_model(name: str, tmp_path: Path) -> None:
    model = adapted(CONFIGS[name])
    expected = logits(model)

    receipt = merge(model, tiny_tokenizer(), tmp_path / "out", SAMPLES)

    torch.testing.assert_close(logits(reload(tmp_path / "out")), expected, rtol=1e-5, atol=2e-5)
    assert receipt.mean_kl < 1e-9 and receipt.top1_agreement == 1 and receipt.recovered > 0.999


def test_merged_folder_is_plain(tmp_path: Path) -> None:
    merge(adapted(LoRAConfig(rank=4)), tiny_tokenizer(), tmp_path / "out", SAMPLES)

    model = reload(tmp_path / "out")
    names = set(tiny_model().state_dict())
    config = json.loads((tmp_path / "out" / "config.json").read_text())

    assert set(model.state_dict()) == names and not any(isinstance(m, Adapter) for m in model.modules())
    assert config["architectures"] == ["LlamaForCausalLM"] and "quantization_config" not in config
    assert "lightning_peft" not in json.dumps(config)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("a b") == tiny_tokenizer().encode("a b")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_receipt_states_what_the_formulas_give(tmp_path: Path) -> None:
    model = adapted(LoRAConfig(rank=4), tiny_model().bfloat16(), amount=0.1)
    adapter = logits(model)
    with torch.no_grad():
        base = logits(tiny_model().bfloat16().eval())

    receipt = merge(model, tiny_tokenizer(), tmp_path / "out", SAMPLES)

    merged = logits(reload(tmp_path / "out"))
    p, q = F.softmax(adapter.double(), -1), F.softmax(merged.double(), -1)
    expected = Receipt(
        max_logit_difference=float((merged - adapter).abs().max()),
        mean_logit_difference=float((merged - adapter).abs().double().mean()),
        mean_kl=float((p * (p / q).log()).sum(-1).mean()),
        top1_agreement=float((merged.argmax(-1) == adapter.argmax(-1)).double().mean()),
        recovered=1 - float((merged - adapter).norm() / (adapter - base).norm()),
        tokens=120,
    )
    assert dataclasses.asdict(receipt) == pytest.approx(dataclasses.asdict(expected), rel=1e-4)
    assert 0 < receipt.mean_kl < 0.01 and 0.5 < receipt.recovered < 1


def test_conv1d_merges(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=320, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1)
    model = adapted(LoRAConfig(rank=4), GPT2LMHeadModel(config))
    expected = logits(model)

    merge(model, tiny_tokenizer(), tmp_path / "out", SAMPLES)

    torch.testing.assert_close(logits(reload(tmp_path / "out")), expected, rtol=1e-5, atol=2e-5)


def test_tied_model_stays_tied(tmp_path: Path) -> None:
    config = LoRAConfig(rank=4, trainable_modules=["embed_tokens", "lm_head"])
    model = adapted(config, tiny_model(tied=True))
    expected = logits(model)

    merge(model, tiny_tokenizer(), tmp_path / "out", SAMPLES)

    merged = reload(tmp_path / "out")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("targets", ["all_linear", ["q_proj"]])
def test_quantised_base_is_written_dequantised(targets: object, tmp_path: Path) -> None:
    model = adapted(LoRAConfig(rank=4, target_modules=targets), quantization=NF4)
    expected = logits(model)

    receipt = merge(model, tiny_tokenizer(), tmp_path / "out", SAMPLES)

    merged = reload(tmp_path / "out")
    assert {type(m) for n, m in merged.named_modules() if n.endswith("_proj")} == {nn.Linear}
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=2e-5)
    assert receipt.recovered > 0.999


def test_no_bar_of_a_library_is_drawn_where_a_model_is_written(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    enable_progress_bar()
    try:
        save_model(tiny_model(seed=0), tiny_tokenizer(), tmp_path, torch.float32)
    finally:
        disable_progress_bar()
    assert "shards" not in capfd.readouterr().err


def test_original_base_is_the_dense_weight_plus_the_change(tmp_path: Path) -> None:
    model = adapted(LoRAConfig(rank=4, trainable_modules=["norm"]), quantization=NF4)
    norm = model.model.norm.weight.detach().clone()
    changes = {name: layer.delta_weight().detach() for name, layer in adapters(model)}

    receipt = merge(
        model, tiny_tokenizer(), tmp_path / "out", SAMPLES, MergeConfig(1.0, base=MergeBase.original), tiny_model()
    )

    merged, original = reload(tmp_path / "out"), tiny_model()
    assert torch.equal(merged.model.norm.weight, norm)
    for name, change in changes.items():
        expected = original.get_submodule(name).weight + change
        torch.testing.assert_close(merged.get_submodule(name).weight, expected, rtol=0, atol=1e-7)
    assert receipt.recovered < 0.999


def test_requantised_base_loads_in_four_bits(tmp_path: Path) -> None:
    model = adapted(LoRAConfig(rank=4), quantization=NF4, amount=0.2)
    changes = {name: layer.delta_weight().detach() for name, layer in adapters(model)}

    receipt = merge(model, tiny_tokenizer(), tmp_path / "out", SAMPLES, MergeConfig(5.0, base=MergeBase.requantised))

    merged = reload(tmp_path / "out")
    assert {type(m).__name__ for n, m in merged.named_modules() if n.endswith("_proj")} == {"Linear4bit"}
    assert len(changes) == 14 and 0 < receipt.mean_kl < 5
    # Both compute x W^T from the same codes.
    again = torch.cat([merged(input_ids=sample).logits.float() for sample in SAMPLES]).detach()
    assert float((again - logits_of_codes(tmp_path)).abs().max()) < 1e-3


def logits_of_codes(folder: Path) -> Tensor:
    """Return the requantised model's logits in another way: bitsandbytes' weights made dense in a plain model."""
    coded = reload(folder / "out")
    plain = tiny_model().eval()
    with torch.no_grad():
        for name, module in coded.named_modules():
            if type(module).__name__ == "Linear4bit":
                from bitsandbytes.functional import dequantize_4bit

                plain.get_submodule(name).weight.copy_(dequantize_4bit(module.weight.data, module.weight.quant_state))
        for name in ("model.embed_tokens", "model.norm", "lm_head"):
            plain.get_submodule(name).weight.copy_(coded.get_submodule(name).weight)
    return logits(plain)


def test_dtype_decides_what_is_lost(tmp_path: Path) -> None:
    small = LoRAConfig(rank=4)

    rounded = merge(adapted(small, tiny_model().bfloat16(), amount=0.003), tiny_tokenizer(), tmp_path / "a", SAMPLES)
    exact = merge(
        adapted(small, tiny_model().bfloat16(), amount=0.003),
        tiny_tokenizer(),
        tmp_path / "b",
        SAMPLES,
        MergeConfig(dtype="fp32"),
    )

    assert reload(tmp_path / "a").dtype == torch.bfloat16 and reload(tmp_path / "b").dtype == torch.float32
    assert rounded.recovered < exact.recovered
    base, merged = tiny_model().bfloat16(), reload(tmp_path / "b")
    change = merged.model.layers[0].mlp.up_proj.weight - base.model.layers[0].mlp.up_proj.weight.float()
    assert torch.linalg.matrix_rank(change, atol=1e-6) == 4


def test_too_large_a_difference_leaves_nothing(tmp_path: Path) -> None:
    model = adapted(LoRAConfig(rank=4), quantization=NF4, amount=0.2)

    with pytest.raises(MergeError, match=r"not written, KL .* is above merge.max_kl=1e-06; merged against") as caught:
        merge(model, tiny_tokenizer(), tmp_path / "out", SAMPLES, MergeConfig(1e-6, base=MergeBase.requantised))

    assert list(tmp_path.iterdir()) == [] and "\n" not in str(caught.value)


def test_too_little_recovered_leaves_nothing(tmp_path: Path) -> None:
    config = MergeConfig(max_kl=10, min_recovered=0.99, base=MergeBase.requantised)

    with pytest.raises(MergeError, match="of the adapter's effect is below merge.min_recovered=0.99"):
        merge(adapted(LoRAConfig(rank=4), quantization=NF4), tiny_tokenizer(), tmp_path / "out", SAMPLES, config)

    assert list(tmp_path.iterdir()) == []


def test_adapter_without_effect_has_no_share_to_recover(tmp_path: Path) -> None:
    model = tiny_model()
    inject_adapters(model, LoRAConfig(rank=4))

    receipt = merge(model, tiny_tokenizer(), tmp_path / "out", SAMPLES)

    assert math.isnan(receipt.recovered) and receipt.max_logit_difference < 1e-6


def test_existing_output_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")

    with pytest.raises(MergeError, match="exists already; give a new folder"):
        merge(adapted(LoRAConfig(rank=4)), tiny_tokenizer(), tmp_path, SAMPLES)

    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_method_that_cannot_be_merged_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(LoRAConfig(rank=4))
    monkeypatch.setattr(type(next(adapters(model))[1]), "mergeable", False)

    with pytest.raises(NotMergeableError, match="cannot be merged"):
        merge(model, tiny_tokenizer(), tmp_path / "out", SAMPLES)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_kl": 0.0}, "merge.max_kl=0.0: must be above 0"),
        ({"min_recovered": 1.5}, "merge.min_recovered=1.5: must be at most 1"),
        ({"dtype": "int8"}, "merge.dtype=int8: must be one of fp32, bf16, fp16, or null"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MergeConfig(**options)


def test_original_needs_the_original(tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="merge.base=original needs the base before quantisation"):
        merge(
            adapted(LoRAConfig(rank=4)), tiny_tokenizer(), tmp_path / "o", SAMPLES, MergeConfig(base=MergeBase.original)
        )
