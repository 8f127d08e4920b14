"""Models whose Python files lie beside their weights."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from families import small_model
from family_checks import batch, own_logits, own_loss, samples
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from lightning_peft.adapters.inject import inject_adapters
from lightning_peft.adapters.lora import LoRAConfig
from lightning_peft.checkpoint.merged import merge
from lightning_peft.checkpoint.peft_format import file_tensors
from lightning_peft.models.loading import empty_model, load_model
from lightning_peft.models.source import ModelConfig
from lightning_peft.models.tiny import tiny_tokenizer
from lightning_peft.objectives.sft import SupervisedLoss

CONFIGURATION = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own_type"
"""
DOUBLED = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *inputs, **options):
        output = super().forward(*inputs, **options)
        output.logits = 2.0 * output.logits
        return output
"""
MEANS = """
import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from .configuration_own import OwnConfig

class OwnForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(nn.Linear(config.hidden_size, config.hidden_size) for _ in range(2))
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
    ENDS
    def forward(self, input_ids, attention_mask=None):
        x = self.wte(input_ids)
        for layer in self.h:
            x = x + layer(x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None])
        return CausalLMOutput(logits=self.head(x))
"""
"""Code of years ago: it knows no positions, no caches and no packed samples."""
ENDS = """
    def get_input_embeddings(self):
        return self.wte

    def get_output_embeddings(self):
        return self.head
"""


@pytest.fixture(scope="module", autouse=True)
def own_modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Have a cache of modules: transformers copies the files into it and imports from there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


def own_model(folder: Path, modeling: str, kind: str, model_type: str | None = None) -> ModelConfig:
    """Write a folder with files of its own; `kind` is in the names of its classes, which transformers keeps by name."""
    small_model("llama").save_pretrained(folder)
    names = {"OwnConfig": f"{kind}Config", "OwnForCausalLM": f"{kind}ForCausalLM", "own_type": kind.lower()}
    for file, text in {"configuration_own.py": CONFIGURATION, "modeling_own.py": modeling}.items():
        for ours, theirs in names.items():
            text = text.replace(ours, theirs)
        (folder / file).write_text(text)
    words = json.loads((folder / "config.json").read_text())
    auto = {
        "AutoConfig": f"configuration_own.{kind}Config",
        "AutoModelForCausalLM": f"modeling_own.{kind}ForCausalLM",
    }
    words |= {"model_type": model_type or kind.lower(), "architectures": [f"{kind}ForCausalLM"], "auto_map": auto}
    (folder / "config.json").write_text(json.dumps(words))
    return ModelConfig("hf", str(folder), trust_remote_code=True)


def adapted(config: ModelConfig) -> torch.nn.Module:
    model = load_model(config, torch.float32)
    inject_adapters(model, LoRAConfig(rank=4))
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in file_tensors(model).values():
            tensor.add_(0.05 * torch.randn(tensor.shape))
    return model


def plain(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()


def test_consent_is_asked_for_by_our_option(tmp_path: Path) -> None:
    config = own_model(tmp_path / "base", DOUBLED, "Asked")
    config.trust_remote_code = False
    with pytest.raises(ValueError, match="read them first, then model.trust_remote_code=true accepts that") as caught:
        empty_model(config)
    assert "trust_remote_code=True" not in str(caught.value)


def test_its_own_loss_is_trained_and_its_files_go_with_the_merged_model(tmp_path: Path) -> None:
    config = own_model(tmp_path / "base", DOUBLED, "Doubled")
    with torch.no_grad():
        got = SupervisedLoss(load_model(config, torch.float32))(batch(packing=False))
        torch.testing.assert_close(got, own_loss(plain(tmp_path / "base")), rtol=2e-5, atol=0)
    model = adapted(config)
    expected = own_logits(model)
    merge(model, tiny_tokenizer(), tmp_path / "merged", [samples()[0][None]])
    torch.testing.assert_close(own_logits(plain(tmp_path / "merged")), expected, rtol=0, atol=1e-4)


def test_a_class_of_transformers_is_merged_without_the_names_of_files_that_did_not_run(tmp_path: Path) -> None:
    config = own_model(tmp_path / "base", DOUBLED, "Known", model_type="llama")
    config.trust_remote_code = False
    model = adapted(config)
    expected = own_logits(model)
    merge(model, tiny_tokenizer(), tmp_path / "merged", [samples()[0][None]])
    torch.testing.assert_close(own_logits(plain(tmp_path / "merged")), expected, rtol=0, atol=1e-4)


def test_a_model_of_years_ago_is_trained(tmp_path: Path) -> None:
    config = own_model(tmp_path / "base", MEANS.replace("ENDS", ENDS), "Means")
    shapes = {"wte.weight": (96, 64), "h.0.weight": (64, 64), "h.1.weight": (64, 64), "head.weight": (96, 64)}
    shapes |= {"h.0.bias": (64,), "h.1.bias": (64,)}
    generator = torch.Generator().manual_seed(0)
    tensors = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "base/model.safetensors", {"format": "pt"})
    with torch.no_grad():
        got = SupervisedLoss(load_model(config, torch.float32))(batch(packing=False))
        logits = [plain(tmp_path / "base")(ids[None]).logits[0] for ids in samples()]
    expected = sum(F.cross_entropy(x[:-1], ids[1:], reduction="sum") for x, ids in zip(logits, samples(), strict=True))
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=0)


def test_a_model_that_names_no_embedding_is_refused_with_what_to_write(tmp_path: Path) -> None:
    config = own_model(tmp_path / "base", MEANS.replace("ENDS", ""), "Nameless")
    with pytest.raises(ValueError, match="write get_input_embeddings, and get_output_embeddings for the head"):
        empty_model(config)
