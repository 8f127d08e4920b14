"""The middleware in front of vLLM: prompts as they were trained, and adapters that are checked before they are loaded.

vLLM's interpreter imports this file and `adapter_checks`, with nothing else of ours beside the two: the standard
library has to do.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_peft.serving.adapter_checks import (
    CONFIG,
    NAME,
    FolderVersion,
    Settings,
    adapters_in,
    check_adapter,
    check_name,
    folder_version,
    is_there,
    listed,
    read_layout,
    remarks,
)

logger = logging.getLogger(__name__)

SETTINGS = "LIGHTNING_PEFT_SERVING"
"""Variable that names the file of the settings."""
ROLES = ("system", "user", "assistant", "tool")
MODELS = "/v1/models"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
OPEN = ("/", "/health")
"""Paths that are answered without the API key."""
MOST_BYTES = 2**24
AS_IT_IS = "{{ messages[0]['content'] }}"  # the template of text without turns

Scope = Mapping[str, Any]
ASGIMessage = Mapping[str, Any]
Receive = Callable[[], Awaitable[ASGIMessage]]
Send = Callable[[ASGIMessage], Awaitable[None]]


class Refusal(Exception):
    """An answer of one line, and its status."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


def key_fits(authorization: bytes, key: str | None) -> bool:
    """Return whether a request's header has the API key; any will do where there is none to have."""
    return not key or hmac.compare_digest(authorization.removeprefix(b"Bearer "), key.encode())


def with_trained_prompt(body: dict[str, Any], layout: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body of a chat as it was trained: the system prompt, template and tools of a layout where it has none.

    Raises Refusal for one that the layout cannot be applied to.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(turn, dict) for turn in messages):
        raise Refusal(400, "messages: must be a list of turns, one at least")
    for key in ("chat_template", "chat_template_kwargs", "add_special_tokens"):
        if body.get(key) is not None:
            raise Refusal(400, f"{key}: prompts are laid out as the model was trained; leave it out")
    found = dict(body)
    if layout.get("kind", "chat") != "chat":
        if len(messages) != 1 or messages[0].get("role") != "user":
            raise Refusal(400, "messages: this adapter was trained on text without turns; give one user message")
        if body.get("tools"):
            raise Refusal(400, "tools: this adapter was trained on text without turns, with no place for them")
        return {**found, "chat_template": AS_IT_IS, "add_special_tokens": True}
    messages = [{**turn, "role": "system"} if turn.get("role") == "developer" else turn for turn in messages]
    if strangers := [turn.get("role") for turn in messages if turn.get("role") not in ROLES]:
        raise Refusal(400, f"messages: {strangers[0]!r} is no role; there are {', '.join(ROLES)}")
    if layout.get("system_prompt") is not None and messages[0].get("role") != "system":
        messages = [{"role": "system", "content": layout["system_prompt"]}, *messages]
    found["messages"] = messages
    if layout.get("template") is not None:
        found["chat_template"] = layout["template"]
    if layout.get("template_options"):
        found["chat_template_kwargs"] = layout["template_options"]
    if layout.get("tools") and not body.get("tools"):
        found |= {"tools": layout["tools"], "tool_choice": "none"}  # they stand in the prompt, calls are text
    return found


@dataclass
class Loaded:
    """An adapter that vLLM holds."""

    folder: Path
    path: str  # it is the one that vLLM was told
    layout: dict[str, Any]
    version: FolderVersion = ()

    @property
    def is_current(self) -> bool:
        """True where the folder is as it was read, or gone: then what vLLM holds goes on."""
        return not is_there(now := folder_version(self.folder)) or now == self.version


class Adapters:
    """The ASGI application in front of vLLM's.

    Named adapters are there from the start; those in `adapter_dir` are checked and loaded when first asked for.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]):
        self.app = app
        self.settings = Settings(**json.loads(Path(os.environ[SETTINGS]).read_text(encoding="utf-8")))
        self.key = os.environ.get("VLLM_API_KEY")
        self.loaded = {name: self.on_disk(Path(folder)) for name, folder in self.settings.adapters.items()}
        self.running = self.loads = 0
        self.loading = asyncio.Lock()
        self.links = tempfile.TemporaryDirectory(prefix="lightning_peft-")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        if scope["type"] == "lifespan":
            try:
                return await self.app(scope, receive, send)
            finally:
                self.links.cleanup()
        try:
            await self.answer(scope, receive, send)
        except Refusal as refusal:
            said = {"message": str(refusal), "type": "invalid_request_error", "param": None, "code": refusal.code}
            await say(send, {"error": said}, refusal.status)

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or have vLLM answer it. Raises Refusal."""
        path, headers = scope["path"], dict(scope["headers"])
        if scope["method"] == "OPTIONS":
            return await self.app(scope, receive, send)
        if path not in OPEN and not key_fits(headers.get(b"authorization", b""), self.key):
            raise Refusal(401, "the API key is missing or wrong", "invalid_api_key")
        if scope["method"] in ("GET", "HEAD"):
            if path == MODELS:
                return await say(send, {"object": "list", "data": [self.described(name) for name in self.names()]})
            if path.startswith(f"{MODELS}/"):
                return await say(send, self.described(self.known(path.removeprefix(f"{MODELS}/"))))
            return await self.app(scope, receive, send)
        if path not in (CHAT, TEXT, LOAD, UNLOAD):
            raise Refusal(404, f"{path}: not here, as prompts would not be laid out as trained; use {CHAT} or {TEXT}")
        body = await read_body(receive)
        if path in (LOAD, UNLOAD):
            return await say(send, await self.change(path, body, scope))
        if self.running >= self.settings.most_requests:
            raise Refusal(429, f"{self.running} requests run and wait already: try again", "rate_limit_exceeded")
        self.running += 1
        try:
            await self.complete(scope, body, receive, send)
        finally:
            self.running -= 1

    async def complete(self, scope: Scope, body: dict[str, Any], receive: Receive, send: Send) -> None:
        """Have vLLM answer a completion; once more where it came between two loads of an adapter. Raises Refusal."""
        is_away = False

        async def unless_away(message: ASGIMessage) -> None:
            nonlocal is_away
            is_away = is_away or message.get("status") == 404
            if not is_away:
                await send(message)

        for take in (unless_away, send):
            loaded = await self.of_model(body.get("model"), scope)
            await self.app(*request_of(scope, scope["path"], self.as_trained(scope, body, loaded), receive), take)
            if not is_away:
                return
            async with self.loading:
                pass  # whoever reads it anew is done

    def as_trained(self, scope: Scope, body: dict[str, Any], loaded: Loaded) -> dict[str, Any]:
        """Return the body of a completion with the prompt, stops and sampling of an adapter. Raises Refusal."""
        if not isinstance(stops := body.get("stop_token_ids") or [], list):
            raise Refusal(400, f"stop_token_ids={stops}: must be a list")
        for layout in (self.settings.base_layout, loaded.layout):
            stops = [*stops, *(stop for stop in layout.get("stop_token_ids") or [] if stop not in stops)]
        temperature = 0 if body.get("temperature") is None else body["temperature"]  # 0 is greedy, as `generate` is
        body = body | {"stop_token_ids": stops, "temperature": temperature}
        return with_trained_prompt(body, loaded.layout) if scope["path"] == CHAT else body

    def names(self) -> list[str]:
        settings = self.settings
        return list(dict.fromkeys([settings.base_name, *self.loaded, *adapters_in(settings.adapter_dir)]))

    def known(self, name: Any) -> str:
        """Return the name of a model that is here. Raises Refusal."""
        directory, known = self.settings.adapter_dir, (self.settings.base_name, *self.loaded)
        if isinstance(name, str):
            if name in known or (directory and NAME.fullmatch(name) and (Path(directory) / name).is_dir()):
                return name
        raise Refusal(404, f"model={name}: not here; there are {listed(self.names())}", "model_not_found")

    def described(self, name: str) -> dict[str, Any]:
        base = self.settings.base_name
        parent = None if name == base else base
        return {"id": name, "object": "model", "created": 0, "owned_by": "lightning_peft", "parent": parent}

    async def of_model(self, name: Any, scope: Scope) -> Loaded:
        """Return what a model's requests are answered with, loaded from `adapter_dir` if need be. Raises Refusal."""
        if name == self.settings.base_name:
            return Loaded(Path(), "", self.settings.base_layout)
        if isinstance(name, str) and (held := self.current(name)) is not None:
            return held
        name = self.known(name)
        async with self.loading:
            if (held := self.current(name)) is not None:
                return held
            former = self.loaded.get(name)
            place = Path(str(self.settings.adapter_dir)) / name if former is None else former.folder
            return await self.load(name, place, scope)

    def current(self, name: str) -> Loaded | None:
        """Return what vLLM holds under a name, None where it is to be loaded: not yet there, or changed on disk."""
        held = self.loaded.get(name)
        may_load = self.settings.adapter_dir is not None
        return None if held is not None and may_load and not held.is_current else held

    async def change(self, path: str, body: Mapping[str, Any], scope: Scope) -> dict[str, str]:
        """Load or unload an adapter as a client asks. Raises Refusal."""
        name, directory = body.get("lora_name"), self.settings.adapter_dir
        if not self.settings.allow_load or directory is None:
            raise Refusal(403, "adapters are loaded at run time with serve.allow_load=true and adapter_dir= alone")
        if not isinstance(name, str):
            raise Refusal(400, f"lora_name={name}: must be a name")
        if "\0" in f"{name}{body.get('lora_path')}":
            raise Refusal(400, "lora_name, lora_path: hold a zero byte, which no path does")
        async with self.loading:
            if path == UNLOAD:
                if name not in self.loaded:
                    raise Refusal(404, f"lora_name={name}: not loaded; there are {listed([*self.loaded])}")
                await self.ask_vllm(UNLOAD, {"lora_name": name}, scope)
                del self.loaded[name]
                return {"status": "unloaded", "lora_name": name}
            if name in self.loaded and body.get("load_inplace") is not True:
                raise Refusal(400, f"lora_name={name}: is loaded already; load_inplace=true reads it anew")
            given = body.get("lora_path")
            if given is None and name in self.loaded:
                folder = self.loaded[name].folder  # the folder was allowed when it came
            else:
                folder = (Path(directory) / str(given or name)).resolve()
                if not folder.is_relative_to(Path(directory).resolve()):
                    raise Refusal(400, f"lora_path={given}: must lie below {directory}")
            await self.load(name, folder, scope)
            return {"status": "loaded", "lora_name": name}

    async def load(self, name: str, place: Path, scope: Scope) -> Loaded:
        """Check an adapter and have vLLM load it, in place of one of that name. Raises Refusal."""
        try:
            check_name(name, self.settings.base_name)
            folder = next((at for at in (place, place / "adapter") if (at / CONFIG).is_file()), place)
            found = self.on_disk(folder)  # before the files are read: what changes meanwhile is read anew
            await asyncio.to_thread(check_adapter, folder, self.settings)
            for line in remarks(folder, self.settings):
                logger.warning("%s", line)
        except (ValueError, OSError) as error:
            raise Refusal(400, str(error)) from error
        # vLLM keeps prompts by name and path: under a path used before it may be that of former weights.
        # Its load_inplace would read the file again at every step.
        link = Path(self.links.name) / f"{self.loads}-{name}"
        self.loads += 1
        link.symlink_to(folder.resolve(), target_is_directory=True)
        former = self.loaded.get(name)
        if former is not None:
            await self.ask_vllm(UNLOAD, {"lora_name": name}, scope)
        status, said = await self.ask_vllm(LOAD, {"lora_name": name, "lora_path": str(link)}, scope)
        if status != 200:
            if former is not None:
                await self.ask_vllm(LOAD, {"lora_name": name, "lora_path": former.path}, scope)
            raise Refusal(400, f"{folder}: vLLM cannot load it: {said}")
        self.loaded[name] = replace(found, path=str(link))
        return self.loaded[name]

    def on_disk(self, folder: Path) -> Loaded:
        """Return an adapter with its prompts; where its folder does not say, the base's without its system prompt.

        Raises ValueError.
        """
        version, layout = folder_version(folder), read_layout(folder)
        unknown = self.settings.base_layout | {"system_prompt": None}
        return Loaded(folder, str(folder), unknown if layout is None else layout, version)

    async def ask_vllm(self, path: str, body: dict[str, Any], scope: Scope) -> tuple[int, str]:
        """Return the status and the text, or the message, of vLLM's answer to a request of our own."""
        status, parts = 500, []

        async def take(message: ASGIMessage) -> None:
            nonlocal status
            status = message.get("status", status)
            parts.append(message.get("body", b""))

        async def silence() -> ASGIMessage:
            return await asyncio.get_running_loop().create_future()  # our own request has no client that leaves

        await self.app(*request_of(scope, path, body, silence), take)
        text = b"".join(parts).decode(errors="replace")
        try:
            return status, str(json.loads(text)["error"]["message"])
        except (ValueError, TypeError, LookupError):
            return status, text


async def say(send: Send, answer: Mapping[str, Any], status: int = 200) -> None:
    content = json.dumps(answer).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    headers += [(b"retry-after", b"1")] if status == 429 else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


async def read_body(receive: Receive) -> dict[str, Any]:
    """Return the JSON object of a request. Raises Refusal."""
    content, more = bytearray(), True
    while more:
        message = await receive()
        content += message.get("body", b"")
        more = message.get("more_body", False)
        if len(content) > MOST_BYTES:
            raise Refusal(413, f"body: is of more than {MOST_BYTES} bytes")
    try:
        body = json.loads(content)
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:  # half of a surrogate pair is no text either
        raise Refusal(400, f"body: is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise Refusal(400, "body: must be a JSON object")
    return body


def request_of(scope: Scope, path: str, body: Mapping[str, Any], receive: Receive) -> tuple[dict[str, Any], Receive]:
    """Return the scope of a request with another path and body, and what receives it."""
    content, sent = json.dumps(body).encode(), False
    ours = (b"content-length", b"content-type", b"transfer-encoding")
    headers = [(key, value) for key, value in scope["headers"] if key.lower() not in ours]
    headers += [(b"content-length", str(len(content)).encode()), (b"content-type", b"application/json")]

    async def again() -> ASGIMessage:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": content, "more_body": False}

    target = {"method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": headers}
    return {**scope, **target}, again
