"""llama.cpp and vLLM themselves on our exports: the greedy tokens are ours. `make test-engines` brings both."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from lightning_peft.command_configs.of_adapters import ExportConfig, ExportFormat
from lightning_peft.commands.adapted import layout_of, load_for_inference
from lightning_peft.commands.export import base_file, export
from lightning_peft.commands.train import train
from lightning_peft.compose import compose_config
from lightning_peft.inference.continuous_batching import Decoder, RunningSequence
from lightning_peft.inference.sampling import SamplingConfig
from lightning_peft.models.loading import load_model, load_tokenizer
from lightning_peft.models.source import ModelConfig
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
