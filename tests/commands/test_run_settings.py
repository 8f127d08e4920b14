"""The settings of a run go with its adapter: precision, codes, the base it is compared with, its tokens."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lightning_peft.__main__ import main
from lightning_peft.checkpoint.lineage import read_lineage
from lightning_peft.models.loading import load_model
from lightning_peft.models.source import ModelConfig
from lightning_peft.models.tiny import tiny_model, tiny_tokenizer
from lightning_peft.quantization.config import Kind, QuantizationConfig
from lightning_peft.quantization.quantize import dequantized_linear
from lightning_peft.quantization.weights import is_quantized

IDS = torch.arange(3, 43)[None]
NAME = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Return an fp32 checkpoint, and rows to train on."""
    folder = tmp_path_factory.mktemp("base")
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.08, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    rows = [{"prompt": f"<add> {a} {b}", "completion": f"<sum> {a + b}"} for a in range(4) for b in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def data(base):
    rows = base / "rows.jsonl"
    return ["data=jsonl", f"data.train_path={rows}", f"data.validation_path={rows}", "data.cache_dir=null"]


def train(base, folder, *words):
    shared = ["model=hf", f"model.path={base}", *data(base), "rank=r4", "optimizer.lr=0.01", "data.max_length=64"]
    assert main(["train", *shared, "trainer.max_steps=8", "trainer.accelerator=cpu", f"run_dir={folder}", *words]) == 0
    return folder


def scores(folder, *words):
    assert main(["evaluate", f"adapter_path={folder}", "max_rows=4", f"output={folder}/scores.json", *words]) == 0
    return json.loads((folder / "scores.json").read_text())


@pytest.fixture(scope="module")
def own_loss(base, tmp_path_factory):
    """Return the loss of the base alone, in fp32."""
    output = tmp_path_factory.mktemp("own") / "scores.json"
    words = ["model=hf", f"model.path={base}", *data(base), "models=base", "precision=32-true", "data.max_length=64"]
    assert main(["evaluate", *words, f"output={output}", "max_rows=4"]) == 0
    return json.loads(output.read_text())["base"]["loss"]


def dequantised(base):
    model = load_model(ModelConfig("hf", str(base)), torch.float32, QuantizationConfig(Kind.nf4))
    for name, layer in list(model.named_modules()):
        if is_quantized(layer):
            model.set_submodule(name, dequantized_linear(layer))
    return model


def test_a_4_bit_run_in_fp32_is_merged_onto_the_codes_it_was_trained_on(base, tmp_path):
    run = train(base, tmp_path / "run", "method=qlora", "trainer.precision=32-true")
    assert read_lineage(run / "adapter").precision == "32-true"
    assert main(["merge", f"adapter_path={run}", f"output={tmp_path}/merged"]) == 0
    merged, start = load_file(tmp_path / "merged/model.safetensors"), dequantised(base)
    tensors = load_file(run / "adapter/adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.{NAME}.lora_{part}.weight"] for part in "AB")
    expected = start.get_submodule(NAME).weight + 2.0 * B @ A
    assert merged[f"{NAME}.weight"].dtype == torch.float32
    torch.testing.assert_close(merged[f"{NAME}.weight"], expected, rtol=1e-5, atol=1e-6)


def test_a_bf16_run_on_an_fp32_checkpoint_is_merged_in_fp32(base, tmp_path):
    run = train(base, tmp_path / "run", "trainer.precision=bf16-true")
    assert main(["merge", f"adapter_path={run}", f"output={tmp_path}/merged"]) == 0
    merged, stored = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", base))
    assert torch.equal(merged["model.embed_tokens.weight"], stored["model.embed_tokens.weight"])
    tensors = load_file(run / "adapter/adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.{NAME}.lora_{part}.weight"] for part in "AB")
    torch.testing.assert_close(merged[f"{NAME}.weight"], stored[f"{NAME}.weight"] + 2.0 * B @ A, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "words", [["adapter.trainable_modules=[lm_head,embed_tokens]"], ["adapter.trainable_modules=['re:.*norm']"]]
)
def test_the_base_column_is_the_base(words, base, own_loss, tmp_path):
    run = train(base, tmp_path / "run", "trainer.precision=32-true", *words)
    assert scores(run)["base"]["loss"] == pytest.approx(own_loss, rel=1e-5)


def test_the_base_column_of_a_pissa_folder_is_the_base(base, own_loss, tmp_path):
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="pissa", task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path)
    words = ["model=hf", f"model.path={base}", *data(base), "data.max_length=64", "precision=32-true"]
    assert scores(tmp_path, *words)["base"]["loss"] == pytest.approx(own_loss, rel=1e-5)


def test_new_tokens_go_with_the_adapter(base, tmp_path):
    tokens = "model.new_tokens=['<add>','<sum>']"
    trained = "adapter.trainable_modules=[embed_tokens,lm_head]"
    run = train(base, tmp_path / "run", "trainer.precision=32-true", tokens, trained)
    alone = scores(run)["adapter"]["loss"]
    assert scores(run, "model=hf", f"model.path={base}")["adapter"]["loss"] == pytest.approx(alone, rel=1e-6)
    assert "<sum>" in (run / "adapter/tokenizer.json").read_text()
    assert main(["merge", f"adapter_path={run}", "model=hf", f"model.path={base}", f"output={tmp_path}/merged"]) == 0
    assert "<sum>" in (tmp_path / "merged/tokenizer.json").read_text()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_reads_images_goes_with_a_merged_or_tuned_model(base, tmp_path, method):
    """Files that transformers' saving of model and tokenizer leaves behind."""
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    files = {"preprocessor_config.json": "{}", "processor_config.json": "{}", "processing_x.py": "", "LICENSE": "free"}
    for name, text in files.items():
        (copy / name).write_text(text)
    words = ["method=full"] if method == "full" else []
    folder = tmp_path / "run"
    shared = ["model=hf", f"model.path={copy}", *data(copy), "data.max_length=64", "trainer.max_steps=1", *words]
    assert main(["train", *shared, "trainer.accelerator=cpu", f"run_dir={folder}"]) == 0
    output = folder / "model"
    if method == "lora":
        output = tmp_path / "merged"
        assert main(["merge", f"adapter_path={folder}", f"output={output}"]) == 0
    assert {name: (output / name).read_text() for name in files} == files
    assert not (output / "rows.jsonl").exists()
