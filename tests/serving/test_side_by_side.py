"""Clients side by side: what one asks for holds up no other."""

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from adapter_models import config_for
from server_process import save
from transformers import PreTrainedTokenizerFast

from lightning_peft.adapters.slots import Slots
from lightning_peft.data.layout import PromptLayout
from lightning_peft.inference.continuous_batching import Decoder
from lightning_peft.models.loading import load_model, load_tokenizer
from lightning_peft.models.source import ModelConfig
from lightning_peft.models.tiny import CHAT_TEMPLATE
from lightning_peft.serving.engine import Engine
from lightning_peft.serving.server import build_app
from lightning_peft.serving.server_config import ServerConfig
from lightning_peft.serving.state import Serving
from lightning_peft.serving.tiers import AdapterTiers

SECONDS_HELD = 20.0
"""Time that a test which is to fail takes."""
HI = [{"role": "user", "content": "hi"}]


class HeldTokenizer(PreTrainedTokenizerFast):
    """Counts tokens when it is let, or after `SECONDS_HELD`: a prompt that takes long."""

    counting: threading.Event
    let: threading.Event
    was_let: bool

    def __call__(self, *given: Any, **options: Any) -> Any:
        self.counting.set()
        self.was_let = self.let.wait(SECONDS_HELD)
        return super().__call__(*given, **options)


@pytest.mark.parametrize(
    ("path", "body"),
    [("chat/completions", {"messages": [{"role": "user", "content": "hi"}]}), ("completions", {"prompt": "hi"})],
)
def test_others_are_answered_while_the_tokens_of_a_prompt_are_counted(path: str, body: dict[str, Any]) -> None:
    source = ModelConfig("tiny")
    tokenizer = load_tokenizer(source)
    tokenizer.__class__ = HeldTokenizer
    tokenizer.counting, tokenizer.let = threading.Event(), threading.Event()
    engine = Engine(Decoder(load_model(source, torch.float32).eval()), None, tokenizer, 4, 4)
    layout = PromptLayout(template=CHAT_TEMPLATE, stop_token_ids=[2])
    app = build_app(Serving(engine, None, tokenizer, "tiny", layout, 2048, ServerConfig()))

    async def asked() -> int:
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here", timeout=None) as client,
        ):
            post = client.post(f"/v1/{path}", json={"model": "tiny", "max_tokens": 2, **body})
            answer = asyncio.create_task(post)
            assert await asyncio.to_thread(tokenizer.counting.wait, SECONDS_HELD)
            assert (await client.get("/health")).json() == {"status": "ok"}
            tokenizer.let.set()
            return (await answer).status_code

    assert asyncio.run(asked()) == 200
    assert tokenizer.was_let


def served(place: Path, check: Callable[[Path], object] = lambda folder: None) -> Serving:
    """Return the tiny model with the adapters of two folders, `a` and those in `dir`."""
    source = ModelConfig("tiny")
    model, tokenizer = load_model(source, torch.float32).eval(), load_tokenizer(source)
    slots = Slots(model, 2, 8, torch.float32)
    tiers = AdapterTiers(slots, 8, check, place / "dir")
    tiers.folders = {"a": place / "a"}
    engine = Engine(Decoder(model, slots), tiers, tokenizer, 4, 4)
    layout = PromptLayout(template=CHAT_TEMPLATE, stop_token_ids=[2])
    return Serving(engine, tiers, tokenizer, "tiny", layout, 2048, ServerConfig(allow_load=True))


def test_a_prompt_that_changes_while_it_is_read_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first client reads it from a slow disk, the second one asks once there is another."""
    save(tmp_path / "dir" / "copy", config_for("lora", rank=8), 0.2)
    serving, load, reading, let = served(tmp_path), PromptLayout.load, threading.Event(), threading.Event()

    def slow(folder: Path) -> PromptLayout | None:
        found = load(folder)
        reading.set()
        assert let.wait(SECONDS_HELD)
        return found

    monkeypatch.setattr(PromptLayout, "load", slow)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(serving.layout, serving.folder("copy"))
        assert reading.wait(SECONDS_HELD)
        PromptLayout("chat", "Be short.", CHAT_TEMPLATE).save(tmp_path / "dir" / "copy")
        folder = serving.folder("copy")
        let.set()
        assert first.result().system_prompt == "Answer in SQL."
    assert serving.layout(folder).system_prompt == "Be short."


def test_one_of_two_that_load_a_name_at_once_is_told(tmp_path: Path) -> None:
    for name in ("dir/x", "dir/y"):
        save(tmp_path / name, config_for("lora", rank=8), 0.2)
    both = threading.Barrier(2, timeout=SECONDS_HELD)
    app = build_app(served(tmp_path, lambda folder: both.wait()))

    async def asked() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
            bodies = [{"lora_name": "new", "lora_path": name} for name in ("x", "y")]
            return await asyncio.gather(*(client.post("/v1/load_lora_adapter", json=body) for body in bodies))

    answers = asyncio.run(asked())
    assert sorted(answer.status_code for answer in answers) == [200, 400]
    assert any("is loaded already" in answer.text for answer in answers)


def test_others_are_answered_while_an_adapter_is_read(tmp_path: Path) -> None:
    """One adapter is unloaded and another one has new files while a third comes from a slow disk."""
    for name in ("a", "dir/copy", "dir/slow"):
        save(tmp_path / name, config_for("lora", rank=8), 0.2)
    reading, let = threading.Event(), threading.Event()
    was_let: list[bool] = []

    def wait(folder: Path) -> None:
        if folder.name == "slow":
            reading.set()
            was_let.append(let.wait(SECONDS_HELD))

    serving = served(tmp_path, wait)
    app, engine = build_app(serving), serving.engine

    async def asked() -> list[int]:
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here", timeout=None) as client,
        ):
            body = {"messages": HI, "max_tokens": 2}
            answers = [await client.post("/v1/chat/completions", json=body | {"model": "copy"})]
            slow = asyncio.create_task(client.post("/v1/chat/completions", json=body | {"model": "slow"}))
            assert await asyncio.to_thread(reading.wait, SECONDS_HELD)
            os.utime(tmp_path / "dir" / "copy" / "adapter_model.safetensors")
            changed = asyncio.create_task(client.post("/v1/chat/completions", json=body | {"model": "copy"}))
            answers.append(await client.post("/v1/unload_lora_adapter", json={"lora_name": "a"}))
            answers.append(await client.get("/v1/models/copy"))
            assert engine.adapters.locked() and not slow.done()
            let.set()
            return [answer.status_code for answer in (*answers, await changed, await slow)]

    assert asyncio.run(asked()) == [200] * 5
    assert was_let == [True]
