"""Estimated against measured peak memory: `python benchmarks/planner.py [NAME ...]`, all configurations by default.

Each configuration trains two steps in a process of its own: the real `train` on random weights of a real shape. On a
CPU the peak is the largest anonymous resident memory (RssAnon, read every half millisecond) above that after imports,
with glibc told to give freed memory back at once (the MALLOC_ variables below); on CUDA it is max_memory_allocated.
Results go to benchmarks/results/planner.json after each configuration; those there are estimated anew but
not measured again. --fresh drops them, --list prints the names.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401  what training imports late is imported here, and so in no measured process
import torch
import transformers.models.llama.modeling_llama
import transformers.models.qwen2.modeling_qwen2  # noqa: F401
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.memory import anonymous_bytes
from lightning_peft.commands.step_estimate import estimate_of
from lightning_peft.commands.train import train
from lightning_peft.compose import compose_config
from lightning_peft.models.tiny import tiny_tokenizer

RESULTS = Path(__file__).parent / "results" / "planner.json"
WORK = Path(tempfile.gettempdir()) / "lightning_peft_planner"
MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "65536",
}
SECONDS_BETWEEN_LOOKS = 0.0005
SMALLEST = 500e6
"""Bytes below which the fixed part of a process says more than the plan."""
BARS = {"median": 0.05, "worst": 0.15}

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 8192}
MODELS: dict[str, dict[str, Any]] = {
    "smollm2_135m": LLAMA
    | {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
       "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    "llama_2_7b_2_layers": LLAMA
    | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 2, "num_attention_heads": 32,
       "num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False},
    "llama_3_2_1b_4_layers": LLAMA
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4, "num_attention_heads": 32,
       "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True},
    "qwen_2_5_0_5b": {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "max_position_embeddings": 8192,
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
}  # fmt: skip
"""Published shapes, the large ones with fewer layers."""

CASES: dict[str, list[str]] = {
    "smollm2_135m": [
        "lora 1x256", "lora 2x128", "lora 4x64", "lora 1x512", "lora 2x256", "lora 2x128 selective", "lora 2x128 none",
        "lora 2x128 blocks", "lora 2x128 offload", "lora 4x128 blocks", "lora 2x256 adapter.dropout=0.1",
        "lora 2x128 target_modules=query_value", "lora 1x128 trainer.accumulate_grad_batches=2", "lora 2x64 rank=r64",
        "lora 1x128 rank=r256", "lora 1x128 rank=r256 optimizer=adamw_8bit", "qlora 2x128", "qlora 1x256",
        "qlora 4x128", "qlora 4x128 none", "qlora 4x128 blocks", "qlora 4x128 selective",
        "qlora 2x128 quantization=fp4", "dora 2x128", "qdora 2x128", "vera 2x128", "lora_fa 2x128", "ia3 2x128",
        "miss 2x128", "hira 1x128", "adalora 1x128", "full 1x128", "full 2x64 blocks",
        "full 1x64 optimizer=adamw_8bit",
        "lora 4x512 trainer.precision=bf16-true", "qlora 4x512 trainer.precision=bf16-true",
        "dora 2x512 none trainer.precision=bf16-true", "lora 1x2048 trainer.precision=bf16-true",
        "lora 1x128 strategy=ddp trainer.devices=2", "lora 1x128 strategy=fsdp trainer.devices=2",
        "qlora 2x128 strategy=fsdp trainer.devices=2", "full 1x64 strategy=fsdp trainer.devices=2",
    ],
    "llama_2_7b_2_layers": [
        "qlora 1x64", "qlora 2x64", "qlora 2x64 blocks", "qlora 1x64 rank=r128", "qdora 1x64", "lora 1x64", "dora 1x64",
    ],
    "llama_3_2_1b_4_layers": [
        "lora 1x64", "qlora 1x64", "qlora 2x64 none", "qlora 2x64 selective", "qlora 1x64 rank=r64",
    ],
    "qwen_2_5_0_5b": ["lora 1x64", "qlora 1x64", "qlora 2x64 blocks"],
}  # fmt: skip
"""method, rows x tokens, activation checkpointing if any, further overrides."""


def main() -> None:
    names = [f"{model} {case}" for model, cases in CASES.items() for case in cases]
    words = sys.argv[1:]
    if "--list" in words:
        print("\n".join(names))
        return
    if "--fresh" in words:
        RESULTS.unlink(missing_ok=True)
    chosen = [word for word in words if not word.startswith("--")] or names
    # All measurements before the first estimate: a fork begins with what this process holds.
    for name in chosen:
        if name not in load():
            write({"name": name, "measured": measure(train_words(name))})
    for name in chosen:
        write(compared(load()[name]))
    report(list(load().values()))


def compared(result: dict[str, Any]) -> dict[str, Any]:
    """Return a measurement with the estimate beside it."""
    name, measured = result["name"], result["measured"]
    overrides = train_words(name)
    estimate = estimate_of(compose_config("estimate", overrides))
    error = estimate.peak / measured - 1
    line = f"{name}: estimated {estimate.peak / 2**20:,.0f} MiB ({estimate.phase}), measured {measured / 2**20:,.0f}"
    print(f"{line}, {error:+.1%}", flush=True)
    return {
        "name": name,
        "measured": measured,
        "estimated": estimate.peak,
        "phase": estimate.phase,
        "error": error,
    }


def train_words(name: str) -> list[str]:
    """Return the overrides of a configuration."""
    model, method, size, *others = name.split()
    rows, length = size.split("x")
    others = [word if "=" in word else f"activation_checkpointing={word}" for word in others]
    if not any(word.startswith("trainer.precision=") for word in others):
        others.append("trainer.precision=32-true")  # the same bytes on every machine
    folder = WORK / "models" / model
    if not (folder / "model.safetensors").exists():
        write_model(MODELS[model], folder)
    return [
        "model=hf", f"model.path={folder}", f"method={method}", f"data.micro_batch_size={rows}",
        f"data.max_length={length}", "data=jsonl", f"data.train_path={write_rows()}", "data.text_column=text",
        "data.validation_fraction=0", "trainer.max_steps=2", "logger=none", "checkpoint.every_n_steps=null", *others,
    ]  # fmt: skip


def write_model(shape: dict[str, Any], folder: Path) -> None:
    """Write a model folder with random fp32 weights and a byte tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    options = {key: value for key, value in shape.items() if key not in ("model_type", "architectures")}
    config = AutoConfig.for_model(shape["model_type"], **options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors = {
        name: torch.ones(tensor.shape) if tensor.ndim == 1 else torch.empty(tensor.shape).uniform_(-0.03, 0.03)
        for name, tensor in model.state_dict().items()
        if not (config.tie_word_embeddings and name == "lm_head.weight")
    }
    config.architectures = shape["architectures"]
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    save_file(tensors, folder / "partial", metadata={"format": "pt"})
    (folder / "partial").rename(folder / "model.safetensors")


def write_rows() -> Path:
    """Write rows of text longer than any sequence: full rows, every token supervised."""
    path = WORK / "rows.jsonl"
    if not path.exists():
        text = "the quick brown fox jumps over the lazy dog " * 60
        path.write_text("".join(json.dumps({"text": f"{number} {text}"}) + "\n" for number in range(64)))
    return path


def measure(overrides: list[str]) -> int:
    """Measure the peak bytes of a training in a process of its own: a fork of this one, which has its imports."""
    run_dir = tempfile.mkdtemp(dir=WORK)
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        child([*overrides, f"run_dir={run_dir}/run"], write_end)
    os.close(write_end)
    with os.fdopen(read_end) as said:
        baseline, peak = int(said.readline()), 0
        while os.waitpid(pid, os.WNOHANG) == (0, 0):
            peak = max(peak, *map(anonymous_bytes, [pid, *children(pid)]))
            time.sleep(SECONDS_BETWEEN_LOOKS)
        last_words = said.read().split()
    if not last_words:
        raise SystemExit(f"training failed: {' '.join(overrides)}")
    if any(word.startswith("trainer.devices=") for word in overrides):
        baseline = rank_baseline(overrides)
    return int(last_words[0]) or peak - baseline


def rank_baseline(overrides: list[str]) -> int:
    """Measure RssAnon after the imports of a rank, which is no fork; bitsandbytes, 42 MiB, only where it is used."""
    config = compose_config("train", overrides)
    modules = ["lightning_peft.commands.train", "transformers.models.llama.modeling_llama"]
    if config.quantization.is_on or config.optimizer.name.endswith("8bit"):
        modules.append("bitsandbytes")
    program = f"import {', '.join(modules)}; print(open('/proc/self/status').read())"
    status = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def child(overrides: list[str], answers: int) -> None:
    """Train; tell the memory before, and at the end the peak allocated on CUDA, 0 on a CPU. The process ends here."""
    status = 1
    try:
        os.write(answers, f"{anonymous_bytes()}\n".encode())
        train(compose_config("train", overrides))
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        os.write(answers, f"{peak}\n".encode())
        status = 0
    finally:
        os._exit(status)


def children(pid: int) -> list[int]:
    """Return the processes that a process started: the ranks of a run that has several."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def load() -> dict[str, dict[str, Any]]:
    """Return the results that there are, by name."""
    return {r["name"]: r for r in json.loads(RESULTS.read_text())["results"]} if RESULTS.exists() else {}


def write(result: dict[str, Any]) -> None:
    """Add a result to the file."""
    RESULTS.parent.mkdir(exist_ok=True)
    results = load() | {result["name"]: result}
    counted = [abs(r["error"]) for r in results.values() if "error" in r and r["measured"] >= SMALLEST]
    content = {
        "command": "python benchmarks/planner.py",
        "machine": f"{platform.machine()} CPU, {os.cpu_count()} cores" if not torch.cuda.is_available() else "CUDA",
        "torch": torch.__version__,
        "environment": MALLOC,
        "configurations": len(counted),
        "median_error": statistics.median(counted) if counted else None,
        "worst_error": max(counted, default=None),
        "results": list(results.values()),
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


def report(results: list[dict[str, Any]]) -> None:
    counted = [r for r in results if "error" in r and r["measured"] >= SMALLEST]
    errors = [abs(r["error"]) for r in counted]
    worst = max(counted, key=lambda r: abs(r["error"]))
    print(f"{len(errors)} configurations: median error {statistics.median(errors):.1%}, worst {worst['error']:+.1%} "
          f"({worst['name']})")  # fmt: skip


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        # glibc reads them when a process starts.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)
    main()
