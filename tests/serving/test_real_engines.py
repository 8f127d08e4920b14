"""llama.cpp and vLLM themselves on our exports: the greedy tokens are ours. `make test-engines` brings both."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from adapter_models import config_for, perturb
from families import small_model
from llama_cpp_models import CASES, case_model
from peft import LoraConfig, get_peft_model
from pieces import ALSO, TEXTS, bytes_tokenizer, pieces_tokenizer
from server_process import save

from lightning_peft.command_configs.of_adapters import ExportConfig, ExportFormat
from lightning_peft.commands.adapted import layout_of, load_for_inference
from lightning_peft.commands.export import base_file, export
from lightning_peft.commands.train import train
from lightning_peft.compose import compose_config
from lightning_peft.data.layout import PromptLayout
from lightning_peft.inference.continuous_batching import Decoder, RunningSequence
from lightning_peft.inference.sampling import SamplingConfig
from lightning_peft.models.gguf_vocabulary import PRE_TOKENIZERS
from lightning_peft.models.loading import load_model, load_tokenizer
from lightning_peft.models.source import ModelConfig
from lightning_peft.models.tiny import tiny_tokenizer
from lightning_peft.serving.gguf_model import write_gguf_model

pytestmark = pytest.mark.engines

TOKENS = 24
QUESTIONS = (
    "Tables: singer(id, name, age). How many singers are there?",
    "Tables: city(id, name, population). List the names of all cities, the largest first.",
    "Tables: book(id, title, year), author(id, name). Which books are of the year 1999?",
)
TRAINING = (
    "model=smollm2_135m", "data=text_to_sql", "data.max_rows=64", "data.max_validation_rows=8", "data.max_length=128",
    "data.micro_batch_size=4", "trainer.accumulate_grad_batches=1", "trainer.max_steps=6", "optimizer.lr=2e-3",
    "rank=r8", "trainer.precision=32-true",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder with a trained run, `run`, and its base as transformers writes it, `base`, fp32."""
    folder = tmp_path_factory.mktemp("engines")
    train(compose_config("train", [*TRAINING, f"run_dir={folder}/run"]))
    base = ModelConfig(name="smollm2_135m")
    model, tokenizer = load_model(base, torch.float32), load_tokenizer(base)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder


@pytest.fixture(scope="module")
def prompts(folder) -> list[list[int]]:
    tokenizer = load_tokenizer(ModelConfig(name="smollm2_135m"))
    layout = layout_of(str(folder / "run"), tokenizer)
    return [layout.prompt(layout.conversation(question), tokenizer) for question in QUESTIONS]


@pytest.fixture(scope="module")
def expected(folder, prompts) -> list[list[int]]:
    """Return our greedy tokens; they differ from the base's, so an adapter that is not read is seen."""
    model, _ = load_for_inference(str(folder / "run"), None, "32-true")
    base = load_model(ModelConfig(name="smollm2_135m"), torch.float32).eval()
    found, without = (greedy(each, prompts) for each in (model, base))
    assert all(ours != theirs for ours, theirs in zip(found, without, strict=True))
    return found


def greedy(model, prompts: list[list[int]]) -> list[list[int]]:
    rows = [RunningSequence(prompt, SamplingConfig(max_new_tokens=TOKENS), lambda _: True) for prompt in prompts]
    decoder = Decoder(model)
    decoder.add(*rows)
    while decoder.rows:
        decoder.step()
    return [row.tokens for row in rows]


def interpreter(name: str) -> str:
    """Return the interpreter that has an engine."""
    variable = f"{name}_PYTHON"
    if (found := os.environ.get(variable)) is None:
        pytest.fail(f"{variable} is not set: make test-engines makes the environment and sets it")
    return found


def ask(engine: str, python: str, request: dict) -> str:
    script = Path(__file__).with_name(f"{engine}_engine.py")
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, str(script)], input=json.dumps(request), capture_output=True, text=True, env=environment, timeout=3000
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def exported(folder: Path, kind: ExportFormat, **options) -> Path:
    output = folder / kind.name
    export(ExportConfig(adapter_path=str(folder / "run"), output=str(output), format=kind, **options))
    return output


def test_llama_cpp_reads_gguf_lora(folder, prompts, expected):
    base, path = ModelConfig(name="smollm2_135m"), folder / "base.gguf"
    model, tokenizer = load_model(base, torch.float32), load_tokenizer(base)
    write_gguf_model(model, tokenizer, layout_of(None, tokenizer), path, "fp32", base_file(base), "base")
    adapter = exported(folder, ExportFormat.gguf_lora) / "adapter.gguf"
    request = {"model": str(path), "adapter": str(adapter), "prompts": prompts, "tokens": TOKENS}
    assert json.loads(ask("llama_cpp", interpreter("LLAMA_CPP"), request)) == expected


def test_llama_cpp_reads_gguf(folder, prompts, expected):
    model = exported(folder, ExportFormat.gguf, dtype="fp32") / "model.gguf"
    request = {"model": str(model), "adapter": None, "prompts": prompts, "tokens": TOKENS}
    assert json.loads(ask("llama_cpp", interpreter("LLAMA_CPP"), request)) == expected


def test_vllm_reads_plain(folder, prompts, expected):
    adapter = exported(folder, ExportFormat.plain, base_name=str(folder / "base"))
    output = folder / "vllm.json"
    request = {
        "model": str(folder / "base"), "adapter": str(adapter), "prompts": prompts, "tokens": TOKENS, "rank": 8,
        "output": str(output),
    }  # fmt: skip
    ask("vllm", interpreter("VLLM"), request)
    assert json.loads(output.read_text()) == expected


TINY_CASES = {
    "rslora": config_for("lora", rank=4, rank_stabilized=True),
    "ranks": config_for("lora", rank=4, rank_pattern={"q_proj": 2, "layers.1.mlp.*": 6}, alpha_pattern={"v_proj": 3.5}),
    "pissa": config_for("lora", rank=4, init="pissa"),
    "adalora": config_for("adalora"),
    "vera": config_for("vera"),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """Return a folder with adapters of the tiny model by name, and its base as llama.cpp reads it."""
    folder = tmp_path_factory.mktemp("tiny")
    for name, config in TINY_CASES.items():
        save(folder / name, config, 0.1)
    base = ModelConfig("tiny")
    model, tokenizer = load_model(base, torch.float32), load_tokenizer(base)
    write_gguf_model(model, tokenizer, layout_of(None, tokenizer), folder / "base.gguf", "fp32", None, "tiny")
    return folder


@pytest.mark.parametrize("case", TINY_CASES)
def test_llama_cpp_computes_every_low_rank_method(case: str, tiny: Path) -> None:
    """Its scores are off by less than a hundredth of what the adapter changes; its cache is fp16."""
    output, prompt = tiny / f"{case}.out", list(range(3, 60))
    export(
        ExportConfig(
            adapter_path=str(tiny / case), output=str(output), format=ExportFormat.gguf_lora, precision="32-true",
            model=ModelConfig("tiny"),
        )
    )  # fmt: skip
    request = {"model": str(tiny / "base.gguf"), "adapter": str(output / "adapter.gguf"), "scores": [prompt]}
    (theirs,) = torch.tensor(json.loads(ask("llama_cpp", interpreter("LLAMA_CPP"), request)))
    model, _ = load_for_inference(str(tiny / case), ModelConfig("tiny"), "32-true")
    base = load_model(ModelConfig("tiny"), torch.float32).eval()
    with torch.no_grad():
        ours, without = (each(torch.tensor([prompt])).logits[0, -1] for each in (model, base))
    assert (theirs - ours).abs().max() < 0.01 * (without - ours).abs().max()


@pytest.mark.filterwarnings("ignore")
def test_llama_cpp_computes_biases_that_only_the_adapter_has(tmp_path: Path) -> None:
    """HF PEFT's `lora_bias` on layers without a bias: Llama's options add one to all layers of their kind."""
    model = load_model(ModelConfig("tiny"), torch.float32)
    model.save_pretrained(tmp_path / "base")
    load_tokenizer(ModelConfig("tiny")).save_pretrained(tmp_path / "base")
    words = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_bias=True, task_type="CAUSAL_LM")
    theirs = get_peft_model(model, words)
    with torch.no_grad():
        perturb(theirs, 0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    output, prompt = tmp_path / "out", list(range(3, 60))
    export(
        ExportConfig(
            adapter_path=str(tmp_path / "adapter"), output=str(output), format=ExportFormat.gguf, dtype="fp32",
            precision="32-true", model=ModelConfig("hf", str(tmp_path / "base")),
        )
    )  # fmt: skip
    request = {"model": str(output / "model.gguf"), "scores": [prompt]}
    found = json.loads(ask("llama_cpp", interpreter("LLAMA_CPP"), request))
    base = load_model(ModelConfig("tiny"), torch.float32)
    with torch.no_grad():
        expected, without = (each.eval()(torch.tensor([prompt])).logits[0, -1] for each in (theirs, base))
    assert (torch.tensor(found[0]) - expected).abs().max() < 0.01 * (without - expected).abs().max()


@pytest.mark.parametrize("kind", ["pieces", "bytes", *PRE_TOKENIZERS])
def test_llama_cpp_reads_texts_as_the_tokenizer_does(kind: str, tmp_path: Path) -> None:
    made = {"pieces": pieces_tokenizer, "bytes": tiny_tokenizer}
    tokenizer = made[kind]() if kind in made else bytes_tokenizer(kind)
    model = small_model("llama", vocab_size=len(tokenizer))
    write_gguf_model(model, tokenizer, PromptLayout(stop_token_ids=[2]), tmp_path / "m.gguf", "fp32", None, "m")
    texts = [*TEXTS, ALSO[0], ALSO[2], "  List   all\n\tGrüße 漢字 🚀", "the the lazylazy 1234 don't"]
    found = json.loads(ask("llama_cpp", interpreter("LLAMA_CPP"), {"model": str(tmp_path / "m.gguf"), "texts": texts}))
    assert found == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_every_family(case: str, tmp_path: Path) -> None:
    """Its scores are ours, and so is the token that it would say; its GELU is looked up in fp16."""
    model, prompt = case_model(case), [(37 * number + 5) % 300 for number in range(48)]
    write_gguf_model(model, tiny_tokenizer(), PromptLayout(stop_token_ids=[2]), tmp_path / "m.gguf", "fp32", None, "m")
    request = {"model": str(tmp_path / "m.gguf"), "scores": [prompt]}
    (theirs,) = torch.tensor(json.loads(ask("llama_cpp", interpreter("LLAMA_CPP"), request)))
    with torch.no_grad():
        ours = model(torch.tensor([prompt])).logits[0, -1]
    bound = 1e-3 if "gelu" in activation_of(model.config) else 1e-4
    assert (theirs - ours).abs().max() < bound * ours.abs().max() and theirs.argmax() == ours.argmax()


def activation_of(config) -> str:
    return getattr(config, "hidden_activation", None) or config.hidden_act
