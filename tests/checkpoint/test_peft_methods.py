"""Every method in HF's words: HF PEFT reads ours with equal logits, and we read HF's."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import (
    AdaLoraConfig,
    HiraConfig,
    IA3Config,
    LoraConfig,
    MissConfig,
    PeftConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_peft.adapters.adalora import AdaLoRAConfig
from lightning_peft.adapters.base import AdapterConfig
from lightning_peft.adapters.dora import DoRAConfig
from lightning_peft.adapters.hira import HiRAConfig
from lightning_peft.adapters.ia3 import IA3Config as OurIA3Config
from lightning_peft.adapters.initialization import initialize_from_weights
from lightning_peft.adapters.inject import adapters, inject_adapters
from lightning_peft.adapters.intrinsic import IntrinsicConfig
from lightning_peft.adapters.lora import LoRAConfig
from lightning_peft.adapters.lora_fa import LoRAFAConfig
from lightning_peft.adapters.miss import MiSSConfig
from lightning_peft.adapters.registry import METHODS
from lightning_peft.adapters.vera import VeRAConfig
from lightning_peft.checkpoint.lineage import Lineage
from lightning_peft.checkpoint.peft_format import (
    AdapterFileError,
    adapter_config_from_peft,
    load_adapter,
    save_adapter,
)
from lightning_peft.checkpoint.peft_methods import spelling, spellings
from lightning_peft.models.tiny import tiny_model
from lightning_peft.quantization.config import Kind, QuantizationConfig
from lightning_peft.quantization.quantize import quantize_linears

pytestmark = pytest.mark.filterwarnings(
    # transformers 5.23 deprecates what peft 0.21 calls.
    "ignore:.*is_gradient_checkpointing.*:FutureWarning",
    "ignore:Specified to not (save|load) vera_A:UserWarning",
    "ignore:Setting `save_embedding_layers`:UserWarning",
)
# Sums in another order; logits are of order 1 to 10.
TOLERANCE = {"rtol": 1e-5, "atol": 5e-5}


def fresh_model() -> nn.Module:
    return tiny_model().eval()


def logits(model: nn.Module) -> Tensor:
    input_ids = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model(input_ids=input_ids).logits


def move(model: nn.Module, amount: float = 0.05) -> None:
    """Move trained parameters away from where they started."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(amount * torch.randn(parameter.shape, generator=generator))


def adapted(config: AdapterConfig) -> nn.Module:
    model = fresh_model()
    inject_adapters(model, config)
    move(model)
    return model


def reload(folder: Path) -> nn.Module:
    model = fresh_model()
    inject_adapters(model, adapter_config_from_peft(folder))
    load_adapter(model, folder)
    return model.eval()


OURS: dict[str, AdapterConfig] = {
    "adalora": AdaLoRAConfig(rank=6, target_rank=4, alpha=9),
    "dora": DoRAConfig(rank=4),
    "dora_rslora": DoRAConfig(rank=4, rank_stabilized=True, rank_pattern={"up_proj": 6}),
    "dora_embedding": DoRAConfig(rank=4, target_modules=["embed_tokens", "o_proj"]),
    "hira": HiRAConfig(rank=4),
    "ia3": OurIA3Config(),
    "ia3_layer": OurIA3Config(layers="1"),
    "ia3_input_of_one_layer": OurIA3Config(feed_forward=["layers.0.mlp.down_proj"]),
    "lora_fa": LoRAFAConfig(rank=4),
    "miss": MiSSConfig(rank=4),
    "pissa": LoRAConfig(rank=4, init="pissa"),
    "pissa_fast_rslora": LoRAConfig(rank=4, init="pissa_fast", rank_stabilized=True, rank_pattern={"q_proj": 6}),
    "olora": LoRAConfig(rank=4, alpha=5, init="olora"),
    "orthogonal": LoRAConfig(rank=4, init="orthogonal"),
    "vera": VeRAConfig(rank=16),
    "vera_without_pair": VeRAConfig(rank=16, save_projection=False, projection_seed=3),
}


@pytest.mark.parametrize("name", OURS)
def test_hf_peft_reads_ours(name: str, tmp_path: Path) -> None:
    model = adapted(OURS[name])
    save_adapter(model, OURS[name], tmp_path / "a", "tiny")

    theirs = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "a")).eval()

    torch.testing.assert_close(logits(model), logits(theirs), **TOLERANCE)
    assert not torch.allclose(logits(model), logits(fresh_model()), atol=1e-3)


@pytest.mark.parametrize("name", [*OURS, "intrinsic"])
def test_ours_comes_back(name: str, tmp_path: Path) -> None:
    config = OURS.get(name, IntrinsicConfig(dimension=40, projection_seed=2, target_modules=["q_proj", "up_proj"]))
    model = adapted(config)
    save_adapter(model, config, tmp_path / "a", "tiny")

    # PiSSA and OLoRA come back as a LoRA on the untouched base: the same sums in another order.
    torch.testing.assert_close(logits(reload(tmp_path / "a")), logits(model), **TOLERANCE)


TARGETS = ["q_proj", "k_proj", "up_proj", "down_proj"]
# PEFT configs warn when they are made, so each is made in its test.
HF: dict[str, Callable[[], PeftConfig]] = {
    "adalora": lambda: AdaLoraConfig(init_r=6, target_r=4, lora_alpha=9, total_step=10, target_modules=TARGETS),
    "dora": lambda: LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=TARGETS),
    "dora_embedding": lambda: LoraConfig(r=4, use_dora=True, target_modules=["embed_tokens", "q_proj"]),
    "hira": lambda: HiraConfig(r=4, target_modules=TARGETS),
    "ia3": lambda: IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "miss": lambda: MissConfig(r=4, target_modules=TARGETS),
    "pissa": lambda: LoraConfig(r=4, init_lora_weights="pissa", target_modules=TARGETS),
    "olora": lambda: LoraConfig(r=4, init_lora_weights="olora", target_modules=TARGETS),
    "eva_like": lambda: LoraConfig(r=4, target_modules=TARGETS, rank_pattern={"model.layers.1.mlp.up_proj": 7}),
    "vera": lambda: VeraConfig(r=16, target_modules=["q_proj", "o_proj"]),
    "vera_without_pair": lambda: VeraConfig(r=16, target_modules=TARGETS, save_projection=False, projection_prng_key=5),
}


@pytest.mark.parametrize("name", HF)
def test_we_read_hf_peft(name: str, tmp_path: Path) -> None:
    theirs = get_peft_model(tiny_model(), HF[name]()).eval()
    move(theirs)
    theirs.save_pretrained(str(tmp_path))

    torch.testing.assert_close(logits(reload(tmp_path)), logits(theirs), **TOLERANCE)


def test_pruned_adalora_of_hf_keeps_its_first_scaling(tmp_path: Path) -> None:
    theirs = get_peft_model(
        tiny_model(), AdaLoraConfig(init_r=6, target_r=4, lora_alpha=9, total_step=10, target_modules=["q_proj"])
    ).eval()
    move(theirs)
    expected = logits(theirs)
    kept = {0: [True, False, True, True, False, False], 1: [True] * 5 + [False]}
    prefix = "base_model.model.model.layers"
    with torch.no_grad():
        for i, mask in kept.items():
            theirs.get_parameter(f"{prefix}.{i}.self_attn.q_proj.lora_E.default")[~torch.tensor(mask)] = 0
    expected = logits(theirs)
    theirs.peft_config["default"].rank_pattern = {
        f"model.layers.{i}.self_attn.q_proj.lora_E": mask for i, mask in kept.items()
    }
    theirs.save_pretrained(str(tmp_path))

    ours = reload(tmp_path)

    assert [layer.rank for _, layer in adapters(ours)] == [3, 5]
    torch.testing.assert_close(logits(ours), expected, **TOLERANCE)


def test_every_method_with_adapters_has_words() -> None:
    """Methods that are only written leave a folder that another row reads."""
    written = {name: spelling(name) for name, method in METHODS.items() if method.layers}
    assert {name for name, row in written.items() if row.is_read} == set(spellings())
    for row in written.values():
        assert row.is_read or any(row.peft_type == other.peft_type for other in spellings().values())


def test_lineage_tells_lora_fa_from_lora(tmp_path: Path) -> None:
    save_adapter(adapted(OURS["lora_fa"]), OURS["lora_fa"], tmp_path / "a", "tiny", Lineage("f", "tiny", "lora_fa"))
    save_adapter(adapted(OURS["lora_fa"]), OURS["lora_fa"], tmp_path / "b", "tiny")

    assert adapter_config_from_peft(tmp_path / "a").method == "lora_fa"
    assert adapter_config_from_peft(tmp_path / "b").method == "lora"


def test_method_hf_does_not_have_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    config = IntrinsicConfig(dimension=40)

    save_adapter(adapted(config), config, tmp_path / "a", "tiny")

    assert "HF PEFT has no method intrinsic" in caplog.text


@pytest.mark.parametrize("config", [HiRAConfig(rank=4, rank_pattern={"mlp.*": 2}), MiSSConfig(rank=8, rank_last=4)])
def test_ranks_hf_cannot_say_are_logged_and_come_back(
    config: AdapterConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = adapted(config)
    save_adapter(model, config, tmp_path / "a", "tiny")

    assert "HF PEFT has no rank_pattern" in caplog.text
    assert torch.equal(logits(reload(tmp_path / "a")), logits(model))


def test_full_fine_tuning_has_no_adapter_file(tmp_path: Path) -> None:
    config = METHODS["full"].config()
    model = fresh_model()
    inject_adapters(model, config)

    with pytest.raises(ValueError, match="method full has no adapter to save, only a whole model"):
        save_adapter(model, config, tmp_path / "a")


def test_warm_start_of_a_rewritten_base_is_refused(tmp_path: Path) -> None:
    save_adapter(adapted(LoRAConfig(rank=4)), LoRAConfig(rank=4), tmp_path / "a")
    model = adapted(OURS["pissa"])

    with pytest.raises(AdapterFileError, match="is for an untouched base, .* adapter.init=kaiming"):
        load_adapter(model, tmp_path / "a")


def test_rewritten_quantised_base_is_nearest_to_the_dense_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = LoRAConfig(rank=16, init="pissa")
    dense, model = fresh_model(), fresh_model()
    quantize_linears(model, QuantizationConfig(kind=Kind.nf4))
    inject_adapters(model, config)
    initialize_from_weights(dict(adapters(model)), lambda name: dense.get_submodule(name).weight.float())
    move(model)
    save_adapter(model, config, tmp_path / "a")

    error = (logits(reload(tmp_path / "a")) - logits(model)).norm()
    effect = (logits(model) - logits(dense)).norm()

    assert "rewrote a quantised base" in caplog.text
    assert error < 0.1 * effect


def test_randomised_pissa_of_hf_is_refused(tmp_path: Path) -> None:
    theirs = get_peft_model(tiny_model(), LoraConfig(r=4, init_lora_weights="pissa_niter_4", target_modules=TARGETS))
    theirs.save_pretrained(str(tmp_path))

    with pytest.raises(AdapterFileError, match="init_lora_weights='pissa_niter_4' changed the base weights"):
        adapter_config_from_peft(tmp_path)


def test_a_layer_cut_to_rank_0_is_the_bases(tmp_path: Path) -> None:
    words = {"init_r": 4, "target_r": 2, "total_step": 10, "target_modules": ["q_proj", "v_proj"]}
    model = get_peft_model(tiny_model(), AdaLoraConfig(**words))
    layers = [layer for layer in model.modules() if hasattr(layer, "lora_E")]
    with torch.no_grad():
        for layer in layers:
            layer.lora_E["default"].normal_()
        layers[0].lora_E["default"].zero_()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(key for key in tensors if "layers.0.self_attn.q_proj" in key).rpartition(".")[0]
    tensors |= {f"{name}.{part}": tensors[f"{name}.{part}"][:0] for part in ("lora_A", "lora_E")}
    tensors[f"{name}.lora_B"] = tensors[f"{name}.lora_B"][:, :0].contiguous()
    save_file(tensors, path)
    ours = tiny_model()
    inject_adapters(ours, adapter_config_from_peft(tmp_path))
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-5)
