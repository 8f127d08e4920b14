"""OpenAI's endpoints over the engine."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from lightning_peft.data.layout import PromptLayout
from lightning_peft.inference.answer_text import MOST_KEPT
from lightning_peft.inference.load import adapter_folder
from lightning_peft.inference.sampling import SamplingConfig
from lightning_peft.serving.adapter_checks import NAME, folder_version, listed
from lightning_peft.serving.bodies import ChatRequest, LoadRequest, TextRequest
from lightning_peft.serving.completions import Answer, error_body
from lightning_peft.serving.engine import GenerationRequest, Piece, QueueFullError
from lightning_peft.serving.state import ApiError, Serving
from lightning_peft.serving.tiers import AdapterTiers
from lightning_peft.serving.vllm_middleware import key_fits

SECONDS_BETWEEN_LOOKS = 0.5
"""Time between two looks of a waiting request for whether its client is still there."""
RETRY_AFTER = "1"
PAGE = Path(__file__).with_name("page.html")
"""A chat with the base and two adapters side by side; it asks the endpoints below, and nothing else."""
MOST_BYTES = 2**24
"""Largest body of a request."""
DOCS = Path(__file__).with_name("docs.html")
"""The endpoints as openapi.json has them; FastAPI's own page comes from a network."""
OPEN = ("/", "/health", "/docs", "/openapi.json")
"""Paths that are answered without the API key; the page asks for the key."""


class Gate:
    """The checks of a request's size and key, before the application behind it.

    It is none of Starlette's BaseHTTPMiddleware, behind which a request does not see that its client has gone.
    """

    def __init__(self, app: ASGIApp, key: str | None):
        self.app, self.key = app, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self.refusal(scope["path"], Headers(scope=scope)) if scope["type"] == "http" else None
        await (self.app if refusal is None else refusal)(scope, receive, send)

    def refusal(self, path: str, headers: Headers) -> JSONResponse | None:
        length = headers.get("content-length", "0")
        if "transfer-encoding" in headers:
            return JSONResponse(error_body("body: must say its length, as content-length"), 411)
        if int(length) > MOST_BYTES:
            return JSONResponse(error_body(f"body: {length} bytes are more than {MOST_BYTES}"), 413)
        given = headers.get("authorization", "").encode("latin-1")  # the bytes that came
        if path not in OPEN and not key_fits(given, self.key):
            return JSONResponse(error_body("the API key is missing or wrong", "invalid_api_key"), 401)
        return None


def build_app(serving: Serving) -> FastAPI:
    """Return the application. The engine's thread runs while it does."""

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        serving.engine.thread.start()
        yield
        serving.engine.stop()

    app = FastAPI(title="lightning_peft", lifespan=life, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, key=serving.config.api_key)

    @app.exception_handler(ApiError)
    async def say(_: Request, error: ApiError) -> JSONResponse:
        headers = {"Retry-After": RETRY_AFTER} if error.status == 429 else None
        return JSONResponse(error_body(str(error), error.code), error.status, headers)

    @app.exception_handler(RequestValidationError)
    async def say_what_is_wrong(request: Request, error: RequestValidationError) -> JSONResponse:
        first, given = error.errors()[0], request.headers.get("content-type", "none")
        if first["loc"] == ("body",) and "json" not in given:  # it was not read as JSON then
            return JSONResponse(error_body(f"content-type: {given}: must be application/json"), 400)
        if first["type"] == "json_invalid":
            where = f"{first['ctx']['error']} at character {first['loc'][-1]}"
            return JSONResponse(error_body(f"body: is no JSON: {where}"), 400)
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        return JSONResponse(error_body(f"{place or 'body'}: {first['msg'].removeprefix('Value error, ')}"), 400)

    @app.exception_handler(HTTPException)
    async def say_of_http(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(error_body(str(error.detail)), error.status_code, error.headers)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(DOCS.read_text(encoding="utf-8"))

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(metrics_text(serving), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        names = serving.names()
        entry = {"object": "model", "created": 0, "owned_by": "lightning_peft"}
        parent = {True: None, False: serving.base_name}
        return {"object": "list", "data": [{"id": n, **entry, "parent": parent[n == names[0]]} for n in names]}

    @app.get("/v1/models/{name:path}")  # a hub id has a slash
    async def model(name: str) -> dict[str, Any]:
        serving.folder(name)
        parent = None if name == serving.base_name else serving.base_name
        return {"id": name, "object": "model", "created": 0, "owned_by": "lightning_peft", "parent": parent}

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        folder = serving.folder(body.model)
        prompt = await asyncio.to_thread(serving.chat_prompt, folder, body.messages, body.tools)
        top = body.top_logprobs if body.logprobs else 0
        limit = body.max_completion_tokens or body.max_tokens
        return await answered(
            serving, Answer(body, "chat", body.logprobs, top, serving.tokenizer), prompt, folder, limit, request
        )

    @app.post("/v1/completions")
    async def completions(body: TextRequest, request: Request) -> Response:
        folder = serving.folder(body.model)
        if body.echo:
            raise ApiError(400, "echo=true: the prompt is not repeated here")
        prompt = body.prompt
        if isinstance(prompt, str):
            serving.check_size(prompt)
            prompt = (await asyncio.to_thread(serving.tokenizer, prompt))["input_ids"]
        if not prompt:
            raise ApiError(400, "prompt: is empty")
        answer = Answer(body, "text", body.logprobs is not None, body.logprobs or 0, serving.tokenizer)
        return await answered(serving, answer, prompt, folder, body.max_tokens or 16, request, prompt[-MOST_KEPT:])

    @app.post("/v1/load_lora_adapter")
    async def load(body: LoadRequest) -> dict[str, str]:
        tiers = loading_tiers(serving)
        if body.lora_name == serving.base_name:
            raise ApiError(400, f"lora_name={body.lora_name}: is the base's name")
        if not NAME.fullmatch(body.lora_name):
            raise ApiError(400, f"lora_name={body.lora_name!r}: letters, digits, dots, dashes and underscores only")
        is_there = ApiError(400, f"lora_name={body.lora_name}: is loaded already; load_inplace=true reads it anew")
        if body.lora_name in serving.names() and not body.load_inplace:
            raise is_there
        assert tiers.directory is not None
        try:
            if body.load_inplace and body.lora_path is None and body.lora_name in tiers.folders:
                path = tiers.folders[body.lora_name]  # the folder was allowed when it came
            else:
                path = (tiers.directory / (body.lora_path or body.lora_name)).resolve()
                if not path.is_relative_to(tiers.directory.resolve()):
                    raise ApiError(400, f"lora_path={body.lora_path}: must lie below {tiers.directory}")
            folder = adapter_folder(str(path), "lora_path")
            version = folder_version(folder)  # before the files are read: what changes meanwhile is read anew
            PromptLayout.load(folder)
            await asyncio.to_thread(serving.engine.read_anew, folder)
        except (ValueError, OSError) as error:
            raise ApiError(400, str(error)) from error
        if body.lora_name in tiers.folders and not body.load_inplace:  # another client's, who loaded it meanwhile
            raise is_there
        serving.versions[folder] = version
        tiers.folders[body.lora_name] = folder
        return {"status": "loaded", "lora_name": body.lora_name}

    @app.post("/v1/unload_lora_adapter")
    async def unload(body: LoadRequest) -> dict[str, str]:
        tiers = loading_tiers(serving)
        folder = tiers.folders.pop(body.lora_name, None)
        if folder is None:
            raise ApiError(404, f"lora_name={body.lora_name}: not loaded; there are {listed([*tiers.folders])}")
        serving.engine.forget(folder)
        return {"status": "unloaded", "lora_name": body.lora_name}

    return app


def loading_tiers(serving: Serving) -> AdapterTiers:
    """Return the tiers where adapters may be loaded. Raises ApiError."""
    if not serving.config.allow_load or serving.tiers is None or serving.tiers.directory is None:
        raise ApiError(403, "adapters are not loaded at run time here: serve.allow_load=true and adapter_dir= open it")
    return serving.tiers


def failure_of(error: Exception) -> ApiError:
    """Return what a client is told of an answer that failed."""
    if isinstance(error, ValueError | OSError):
        return ApiError(400, str(error))
    return ApiError(500, "the answer failed; see the log")


async def answered(
    serving: Serving,
    answer: Answer,
    prompt: list[int],
    folder: Path | None,
    limit: int | None,
    request: Request,
    before: Sequence[int] = (),
) -> Response:
    """Queue a request and answer it, whole or streamed. A client that goes takes its request with it.

    `before` are the tokens of a text that the answer goes on with.
    """
    body = answer.body
    room = (serving.context or len(prompt) + (limit or 256)) - len(prompt)
    if room < (limit or 1):
        raise ApiError(
            400,
            f"the prompt's {len(prompt)} tokens and {limit or 1} more do not fit the model's {serving.context}",
            "context_length_exceeded",
        )
    seed = random.getrandbits(63) if body.seed is None else body.seed
    sampling = SamplingConfig(
        limit or min(room, 256), body.temperature, body.top_p if body.temperature > 0 else 1.0, seed
    )
    if not all(body.stop):
        raise ApiError(400, "stop: an empty text would end every answer")
    loop, pieces = asyncio.get_running_loop(), asyncio.Queue[Piece]()
    ends = {*serving.base_layout.stop_token_ids, *serving.layout(folder).stop_token_ids}

    def take(piece: Piece) -> None:
        loop.call_soon_threadsafe(pieces.put_nowait, piece)

    generation = GenerationRequest(
        prompt, sampling, frozenset(ends), take, folder, tuple(before), tuple(body.stop), answer.logprobs,
        answer.top_logprobs,
    )  # fmt: skip
    try:
        serving.engine.submit(generation)
    except QueueFullError as error:
        serving.requests[body.model, 429] += 1
        raise ApiError(429, f"{error}: try again", "rate_limit_exceeded") from error

    async def each() -> AsyncIterator[Piece]:
        looked = loop.time()
        try:
            while True:
                # What is streamed learns by its own sending that its client has gone.
                if not body.stream and loop.time() - looked > SECONDS_BETWEEN_LOOKS:
                    if await request.is_disconnected():
                        return
                    looked = loop.time()
                try:
                    piece = await asyncio.wait_for(pieces.get(), SECONDS_BETWEEN_LOOKS)
                except TimeoutError:
                    if await request.is_disconnected():
                        return
                    continue
                yield piece
                if piece.finish_reason is not None or piece.error is not None:
                    return
        finally:
            generation.cancelled = True

    source = each()
    first = await anext(source, None)
    if first is None:
        serving.requests[body.model, 499] += 1
        return Response(status_code=499)  # nobody reads it
    if first.error is not None:
        failure = failure_of(first.error)
        serving.requests[body.model, failure.status] += 1
        raise failure
    serving.requests[body.model, 200] += 1

    def usage() -> dict[str, int]:
        return {
            "prompt_tokens": len(prompt),
            "completion_tokens": len(generation.tokens),
            "total_tokens": len(prompt) + len(generation.tokens),
        }

    if not body.stream:
        found = [first, *[piece async for piece in source]]
        if (failed := found[-1].error) is not None:
            raise failure_of(failed) from failed
        text = "".join(piece.text for piece in found)
        choice = answer.choice(text, found, found[-1].finish_reason, False)
        return JSONResponse({**answer.envelope(False), "choices": [choice], "usage": usage()})

    says_usage = body.stream_options is not None and body.stream_options.include_usage
    no_usage = {"usage": None} if says_usage else {}

    async def events() -> AsyncIterator[str]:
        piece: Piece | None = first
        while piece is not None:
            if piece.error is not None:
                yield f"data: {json.dumps(error_body(str(failure_of(piece.error))))}\n\n"
                return
            choice = answer.choice(piece.text, [piece], piece.finish_reason, True)
            yield f"data: {json.dumps({**answer.envelope(True), 'choices': [choice], **no_usage})}\n\n"
            piece = await anext(source, None)
        if says_usage:
            yield f"data: {json.dumps({**answer.envelope(True), 'choices': [], 'usage': usage()})}\n\n"
        yield "data: [DONE]\n\n"

    async def until_gone() -> AsyncIterator[str]:
        try:
            async for event in events():
                yield event
        finally:
            generation.cancelled = True

    return StreamingResponse(until_gone(), media_type="text/event-stream")


def metrics_text(serving: Serving) -> str:
    """Return what Prometheus reads."""
    engine = serving.engine
    lines = ["# TYPE lightning_peft_requests_total counter"]
    for (model, status), count in sorted(serving.requests.items()):
        label = model.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        lines.append(f'lightning_peft_requests_total{{model="{label}",status="{status}"}} {count}')
    gauges = {
        "tokens_generated_total": ("counter", engine.generated),
        "requests_running": ("gauge", len(engine.running)),
        "requests_waiting": ("gauge", len(engine.waiting)),
    }
    if serving.tiers is not None:
        gauges["adapter_reads_total"] = ("counter", serving.tiers.loads["disk"])
        gauges["adapter_slot_loads_total"] = ("counter", serving.tiers.loads["host"])
    for name, (kind, value) in gauges.items():
        lines += [f"# TYPE lightning_peft_{name} {kind}", f"lightning_peft_{name} {value}"]
    return "\n".join(lines) + "\n"
