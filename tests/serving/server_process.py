"""A server process on the tiny model, adapters for it, and a question to it."""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx
import openai
import torch
from adapter_models import perturb
from started import COMMAND, Started

from lightning_peft.adapters.base import AdapterConfig
from lightning_peft.adapters.inject import inject_adapters
from lightning_peft.checkpoint.lineage import Lineage
from lightning_peft.checkpoint.peft_format import save_adapter
from lightning_peft.data.layout import PromptLayout
from lightning_peft.models.loading import load_model
from lightning_peft.models.source import ModelConfig
from lightning_peft.models.stored import source_fingerprint
from lightning_peft.models.tiny import CHAT_TEMPLATE


def save(folder: Path, config: AdapterConfig, scale: float, base: str = "tiny", seed: int = 0) -> None:
    """Save an adapter as `train` leaves it, its weights moved at random instead."""
    source = ModelConfig(base)
    model = load_model(source, torch.float32)
    torch.manual_seed(seed)
    inject_adapters(model, config)
    perturb(model, scale)
    lineage = Lineage(source_fingerprint(source), base, config.method, precision="32-true")
    save_adapter(model, config, folder, base, lineage)
    PromptLayout(system_prompt="Answer in SQL.", template=CHAT_TEMPLATE, stop_token_ids=[2]).save(folder)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(
    words: list[str], key: str = "none", model: tuple[str, ...] = ("model=tiny",)
) -> tuple[subprocess.Popen[str], openai.OpenAI]:
    port = free_port()
    command = [*COMMAND, "serve", *model, f"serve.port={port}", "precision=32-true", *words]
    process = Started(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for _ in range(600):
        try:
            httpx.get(f"http://127.0.0.1:{port}/health")
            break
        except httpx.TransportError:
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            time.sleep(0.2)
    return process, openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0)


def ended(process: subprocess.Popen[str]) -> str:
    """Return what the server wrote to stderr, once it has left as it was asked to."""
    _, said = process.communicate(timeout=120)
    assert process.returncode in (0, -signal.SIGTERM)
    return said


def ask(client: openai.OpenAI, model: str, question: str, tokens: int = 12, **more) -> str:
    messages = [{"role": "user", "content": question}]
    answer = client.chat.completions.create(model=model, messages=messages, max_tokens=tokens, **more)
    return str(answer.choices[0].message.content)
