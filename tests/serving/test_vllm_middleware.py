"""The middleware in front of vLLM, driven by ASGI calls: an application behind it says what it was asked."""

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from damaged_adapters import changed

from lightning_peft.data.layout import PromptLayout
from lightning_peft.models.tiny import CHAT_TEMPLATE
from lightning_peft.serving.adapter_checks import Settings
from lightning_peft.serving.vllm_middleware import LOAD, SETTINGS, UNLOAD, Adapters

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]


class Behind:
    """An application that answers with what it was asked, and fails to load what is called refused, as vLLM does."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.loaded = {"a"}
        self.away: set[str] = set()
        self.held = asyncio.Event()
        self.held.set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        given = json.loads(body) if body else {}
        assert dict(scope["headers"]).get(b"content-length", b"0") == str(len(body)).encode()
        self.asked.append((scope["path"], given))
        await self.held.wait()
        status, said = 200, {"asked": given}
        if scope["path"] in (CHAT, TEXT) and given["model"] in self.away:
            status, said = 404, {"error": {"message": "The model does not exist.", "code": 404}}
        if scope["path"] == LOAD and given["lora_name"] == "refused":
            status, said = 500, {"error": {"message": "vLLM does not yet support it.", "code": 500}}
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(said).encode()})


@pytest.fixture
def behind() -> Behind:
    return Behind()


@pytest.fixture
def start(behind: Behind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Settings], Adapters]]:
    """Return what makes the middleware of settings, as vLLM makes it."""
    made: list[Adapters] = []

    def front(settings: Settings) -> Adapters:
        path = tmp_path / "settings.json"
        path.write_text(json.dumps(asdict(settings)))
        monkeypatch.setenv(SETTINGS, str(path))
        made.append(Adapters(behind))
        return made[-1]

    yield front
    for each in made:
        each.links.cleanup()


@pytest.fixture
def front(start: Callable[[Settings], Adapters], settings: Settings) -> Adapters:
    return start(settings)


def ask(front: Adapters, path: str, body: Any = None, headers: Any = None, raw: bytes | None = None) -> httpx.Response:
    async def answer() -> httpx.Response:
        transport = httpx.ASGITransport(front)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            if body is None and raw is None:
                return await client.get(path, headers=headers)
            content = raw if raw is not None else json.dumps(body).encode()
            return await client.post(path, content=content, headers=headers)

    return asyncio.run(answer())


def chat(front: Adapters, model: Any, messages: Any = HI, **more: Any) -> httpx.Response:
    return ask(front, CHAT, {"model": model, "messages": messages, **more})


def line(response: httpx.Response) -> str:
    message = response.json()["error"]["message"]
    assert message and "\n" not in message
    return str(message)


def test_a_chat_has_the_trained_system_prompt_template_and_stops(front: Adapters) -> None:
    asked = chat(front, "a", max_tokens=3).json()["asked"]
    assert asked["messages"] == [{"role": "system", "content": "Answer in SQL."}, *HI]
    assert asked["chat_template"] == CHAT_TEMPLATE
    assert asked["stop_token_ids"] == [2]
    assert (asked["temperature"], asked["max_tokens"], asked["model"]) == (0, 3, "a")


def test_a_chat_with_a_system_prompt_keeps_its_own(front: Adapters) -> None:
    for role in ("system", "developer"):
        turns = [{"role": role, "content": "Answer in French."}, *HI]
        asked = chat(front, "a", turns, temperature=0.5).json()["asked"]
        assert asked["messages"] == [{"role": "system", "content": "Answer in French."}, *HI]
        assert asked["temperature"] == 0.5


def test_the_base_has_no_system_prompt(front: Adapters) -> None:
    assert chat(front, "tiny").json()["asked"]["messages"] == HI


def test_an_adapter_that_does_not_say_its_prompt_has_not_the_base_s(
    start: Callable[[Settings], Adapters], settings: Settings, place: Path, tmp_path: Path
) -> None:
    """A base that was tuned itself has one, and the embedded server leaves it out, too."""
    shutil.copytree(place / "a", tmp_path / "others")
    (tmp_path / "others" / "prompt_layout.json").unlink()
    layout = settings.base_layout | {"system_prompt": "Be short."}
    front = start(replace(settings, base_layout=layout, adapter_dir=str(tmp_path)))
    assert chat(front, "tiny").json()["asked"]["messages"] == [{"role": "system", "content": "Be short."}, *HI]
    asked = chat(front, "others").json()["asked"]
    assert (asked["messages"], asked["chat_template"]) == (HI, CHAT_TEMPLATE)


def test_tools_and_options_of_the_template_are_those_of_training(front: Adapters, place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "a", tmp_path / "tools")
    tools = [{"type": "function", "function": {"name": "look"}}]
    PromptLayout(tools=tools, template=CHAT_TEMPLATE, template_options={"thinks": False}).save(tmp_path / "tools")
    front.loaded["tools"] = front.on_disk(tmp_path / "tools")
    asked = chat(front, "tools").json()["asked"]
    assert (asked["tools"], asked["tool_choice"]) == (tools, "none")
    assert asked["chat_template_kwargs"] == {"thinks": False}


def test_text_is_continued_as_it_is(front: Adapters) -> None:
    asked = ask(front, TEXT, {"model": "a", "prompt": "SELECT"}).json()["asked"]
    assert asked == {"model": "a", "prompt": "SELECT", "stop_token_ids": [2], "temperature": 0}


def test_an_adapter_trained_on_text_takes_one_turn_as_it_is(front: Adapters) -> None:
    asked = chat(front, "raw").json()["asked"]
    assert asked["chat_template"] == "{{ messages[0]['content'] }}"
    assert asked["add_special_tokens"] is True
    assert asked["stop_token_ids"] == [2, 5]
    refused = chat(front, "raw", [*HI, {"role": "assistant", "content": "ho"}])
    assert (refused.status_code, "without turns" in line(refused)) == (400, True)
    refused = chat(front, "raw", tools=[{"type": "function", "function": {"name": "look"}}])
    assert (refused.status_code, "no place for them" in line(refused)) == (400, True)


def test_an_adapter_of_the_folder_is_loaded_once_when_first_asked_for(front: Adapters, behind: Behind) -> None:
    for _ in range(2):
        assert chat(front, "copy").status_code == 200
    assert [path for path, _ in behind.asked] == [LOAD, CHAT, CHAT]
    told = behind.asked[0][1]
    assert (told["lora_name"], Path(told["lora_path"]).resolve().name) == ("copy", "copy")


@pytest.mark.parametrize(
    ("name", "status", "says"),
    [
        ("nobody", 404, "model=nobody: not here; there are tiny, a, adalora, copy, "),
        ("../a", 404, "model=../a: not here"),
        ("dir/copy", 404, "not here"),
        (None, 404, "model=None: not here"),
        (["a"], 404, "not here"),
        ("foreign", 400, "this adapter was trained on tiny_tied"),
        ("text", 400, "is a kind of message part"),
        ("layout", 400, "prompt_layout.json: is no JSON object"),
        ("types", 400, "not a prompt layout (system_prompt=3 is of another type)"),
        ("scaled", 400, "was trained with the scaling model.rope_scaling.type=linear model.rope_scaling.factor=2.0, "),
        ("refused", 400, "vLLM cannot load it: vLLM does not yet support it."),
    ],
)
def test_what_cannot_be_answered_is_refused_in_one_line(front: Adapters, name: Any, status: int, says: str) -> None:
    answer = chat(front, name)
    assert (answer.status_code, says in line(answer)) == (status, True), answer.text


def test_an_adapter_that_was_trained_in_other_numbers_is_named(
    front: Adapters, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert chat(front, "copy").status_code == 200 and not caplog.records
    assert chat(front, "other_dtype").status_code == 200
    folder = place / "dir" / "other_dtype"
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder}: was trained in bf16-true and is served in float32, so its answers are not those of `generate`",
        f"{folder}: was trained on a base with quantization.kind=nf4, vLLM has it dense",
    ]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"model": "a"}, "messages: must be a list of turns"),
        ({"model": "a", "messages": []}, "messages: must be a list of turns"),
        ({"model": "a", "messages": ["hi"]}, "messages: must be a list of turns"),
        (
            {"model": "a", "messages": [{"role": "bot", "content": "hi"}]},
            "messages: 'bot' is no role; there are system, ",
        ),
        ({"model": "a", "messages": HI, "stop_token_ids": 2}, "stop_token_ids=2: must be a list"),
        ({"model": "a", "messages": HI, "chat_template": "{{ 1 }}"}, "chat_template: prompts are laid out"),
        ({"model": "a", "messages": HI, "chat_template_kwargs": {"a": 1}}, "chat_template_kwargs: prompts"),
        ([], "body: must be a JSON object"),
        ({"model": "a", "messages": HI, "temperature": float("nan")}, "body: is no JSON: Out of range float"),
    ],
)
def test_bodies_that_are_wrong_get_one_line(front: Adapters, body: Any, says: str) -> None:
    answer = ask(front, CHAT, body)
    assert (answer.status_code, says in line(answer)) == (400, True), answer.text


@pytest.mark.parametrize("raw", [b"{", b"\xff", b"[" * 100_000, b'{"model": "a", "user": "\\ud800"}'])
def test_bytes_that_are_no_text_get_one_line(front: Adapters, raw: bytes) -> None:
    answer = ask(front, CHAT, raw=raw)
    assert (answer.status_code, line(answer).startswith("body: ")) == (400, True)


def test_a_body_that_is_too_large_is_not_read_on(front: Adapters) -> None:
    assert ask(front, CHAT, raw=b" " * (2**24 + 1)).status_code == 413


def test_other_endpoints_that_write_answers_are_closed(front: Adapters, behind: Behind) -> None:
    for path in ("/v1/responses", "/v1/messages", "/invocations", "/tokenize"):
        answer = ask(front, path, {"model": "a", "input": "hi"})
        assert (answer.status_code, "not here" in line(answer)) == (404, True)
    assert behind.asked == []


def test_models_are_the_base_and_its_adapters(front: Adapters) -> None:
    found = {entry["id"]: entry["parent"] for entry in ask(front, "/v1/models").json()["data"]}
    assert found["tiny"] is None
    assert {"a", "copy", "foreign"} < found.keys()
    assert {found[name] for name in found if name != "tiny"} == {"tiny"}
    assert ask(front, "/v1/models/a").json()["parent"] == "tiny"
    assert ask(front, "/v1/models/tiny").json()["id"] == "tiny"
    for name in ("org/sql", "a/", "nobody"):
        answer = ask(front, f"/v1/models/{name}")
        assert (answer.status_code, f"model={name}: not here; there are tiny, a" in line(answer)) == (404, True)


def test_an_adapter_is_loaded_anew_under_a_path_that_was_not_used(front: Adapters, behind: Behind) -> None:
    """vLLM keeps keys and values of prompts that an adapter has answered, by its name and path."""
    for _ in range(2):
        answer = ask(front, LOAD, {"lora_name": "mine", "lora_path": "copy", "load_inplace": True})
        assert answer.json() == {"status": "loaded", "lora_name": "mine"}
    assert [path for path, _ in behind.asked] == [LOAD, UNLOAD, LOAD]
    paths = [body["lora_path"] for path, body in behind.asked if path == LOAD]
    assert paths[0] != paths[1]
    assert {Path(path).resolve().name for path in paths} == {"copy"}
    assert not any("load_inplace" in body for _, body in behind.asked)


def test_an_adapter_whose_files_change_is_loaded_anew_when_it_is_asked_for(
    front: Adapters, behind: Behind, place: Path
) -> None:
    """As a training that writes its folder again does; one that is gone or damaged leaves what vLLM holds."""
    folder = place / "dir" / "written"
    shutil.copytree(place / "a", folder)
    for _ in range(2):
        assert chat(front, "written").status_code == 200
    changed(folder, lambda name, value: (name, -value))
    PromptLayout(system_prompt="Anew.", stop_token_ids=[2]).save(folder)
    for _ in range(2):
        asked = chat(front, "written").json()["asked"]
        assert asked["messages"][0] == {"role": "system", "content": "Anew."}
    assert [path for path, _ in behind.asked] == [LOAD, CHAT, CHAT, UNLOAD, LOAD, CHAT, CHAT]
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert "is damaged" in line(chat(front, "written"))
    weights.write_bytes(whole)
    assert chat(front, "written").status_code == 200
    shutil.rmtree(folder)
    assert chat(front, "written").status_code == 200
    assert [path for path, _ in behind.asked].count(LOAD) == 3


@pytest.mark.parametrize("unloaded", [False, True])
def test_a_request_between_two_loads_of_its_adapter_waits_for_the_second(
    front: Adapters, behind: Behind, unloaded: bool
) -> None:
    async def answers() -> httpx.Response:
        behind.away = {"a"}
        await front.loading.acquire()
        transport = httpx.ASGITransport(front)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            answer = asyncio.create_task(client.post(CHAT, json={"model": "a", "messages": HI}))
            while not behind.asked:
                await asyncio.sleep(0)
            behind.away = set()
            if unloaded:
                del front.loaded["a"]
            front.loading.release()
            return await answer

    answer = asyncio.run(answers())
    if unloaded:
        assert answer.status_code == 404 and line(answer).startswith("model=a: not here; there are tiny, adalora")
    else:
        assert answer.status_code == 200 and [body["model"] for _, body in behind.asked] == ["a", "a"]


def test_loading_at_run_time_keeps_to_the_folder_and_to_names(front: Adapters) -> None:
    said = {
        (name, path): ask(front, LOAD, {"lora_name": name, "lora_path": path})
        for name, path in [
            ("x", "a\0"),
            ("x\0", None),
            ("x", "../a"),
            ("x", "/"),
            ("../x", "copy"),
            ("tiny", "copy"),
            ("a", "copy"),
            (3, "copy"),
        ]
    }
    assert {answer.status_code for answer in said.values()} == {400}
    assert "zero byte" in line(said["x", "a\0"])
    assert "zero byte" in line(said["x\0", None])
    assert "must lie below" in line(said["x", "../a"])
    assert "must lie below" in line(said["x", "/"])
    assert "letters, digits" in line(said["../x", "copy"])
    assert "is the base's name" in line(said["tiny", "copy"])
    assert "is loaded already" in line(said["a", "copy"])


def test_a_failed_load_in_place_leaves_what_was_there(front: Adapters, behind: Behind, place: Path) -> None:
    front.loaded["refused"] = front.on_disk(place / "a")
    answer = ask(front, LOAD, {"lora_name": "refused", "lora_path": "copy", "load_inplace": True})
    assert answer.status_code == 400
    assert front.loaded["refused"].folder == place / "a"
    assert behind.asked[-1] == (LOAD, {"lora_name": "refused", "lora_path": str(place / "a")})


def test_an_adapter_that_was_unloaded_is_not_there(front: Adapters) -> None:
    assert ask(front, LOAD, {"lora_name": "mine", "lora_path": "copy"}).status_code == 200
    assert ask(front, UNLOAD, {"lora_name": "mine"}).json() == {"status": "unloaded", "lora_name": "mine"}
    assert chat(front, "mine").status_code == 404
    assert ask(front, UNLOAD, {"lora_name": "mine"}).status_code == 404


def test_nothing_is_loaded_by_clients_unless_it_is_allowed(
    start: Callable[[Settings], Adapters], settings: Settings
) -> None:
    front = start(replace(settings, allow_load=False))
    assert ask(front, LOAD, {"lora_name": "x", "lora_path": "copy"}).status_code == 403
    assert chat(front, "copy").status_code == 200


def test_the_key_is_asked_for_everywhere_but_at_health(
    start: Callable[[Settings], Adapters], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "geheim-ä"
    monkeypatch.setenv("VLLM_API_KEY", key)
    front = start(settings)
    assert ask(front, "/health").status_code == 200
    assert [ask(front, path).status_code for path in ("/v1/models", "/metrics")] == [401, 401]
    assert chat(front, "a").status_code == 401
    assert ask(front, "/v1/models", headers={"authorization": f"Bearer {key}".encode()}).status_code == 200


def test_a_folder_that_is_removed_leaves_what_is_loaded(
    start: Callable[[Settings], Adapters], settings: Settings
) -> None:
    front = start(replace(settings, adapter_dir="/no/such/folder"))
    assert [model["id"] for model in ask(front, "/v1/models").json()["data"]] == ["tiny", "a"]
    assert chat(front, "a").status_code == 200
    assert chat(front, "b").status_code == 404


def test_more_requests_than_may_wait_are_told_to_come_again(front: Adapters, behind: Behind) -> None:
    async def answers() -> list[httpx.Response]:
        behind.held.clear()
        transport = httpx.ASGITransport(front)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            body = {"model": "a", "messages": HI}
            first = [asyncio.create_task(client.post(CHAT, json=body)) for _ in range(3)]
            while len(behind.asked) < 3:
                await asyncio.sleep(0)
            refused = await client.post(CHAT, json=body)
            behind.held.set()
            return [refused, *[await task for task in first], await client.post(CHAT, json=body)]

    refused, *others = asyncio.run(answers())
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert [answer.status_code for answer in others] == [200] * 4
