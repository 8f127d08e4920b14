"""Requests that nobody should send: each gets one line and a status of the 400s, and the server goes on."""

import json
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from adapter_models import config_for
from safetensors.torch import load_file, save_file
from server_process import ask, ended, save, start

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter, and a folder of others: one with a layout of wrong types, one that is not finite, a link outside."""
    place = tmp_path_factory.mktemp("hostile")
    save(place / "a", config_for("lora", rank=8), 0.2)
    folder = place / "dir"
    for name in ("copy", "layout", "nan", "lineage"):
        shutil.copytree(place / "a", folder / name)
    (folder / "layout" / "prompt_layout.json").write_text('{"system_prompt": 3}')
    (folder / "lineage" / "lineage.json").write_text("[]")
    weights = folder / "nan" / "adapter_model.safetensors"
    save_file({name: value * torch.nan for name, value in load_file(weights).items()}, weights)
    (folder / "nan" / "lineage.json").unlink()
    (folder / "link").symlink_to(place / "a")
    return place


@pytest.fixture(scope="module")
def client(place: Path) -> Iterator[openai.OpenAI]:
    words = [f"adapters=[a={place / 'a'}]", f"adapter_dir={place / 'dir'}", "serve.allow_load=true", "serve.slots=2"]
    process, client = start([*words, "serve.max_rank=16"])
    yield client
    process.send_signal(signal.SIGTERM)
    assert "Traceback" not in ended(process)


def post(client: openai.OpenAI, path: str, body: Any = None, raw: bytes | None = None) -> httpx.Response:
    content = raw if raw is not None else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    return httpx.post(f"{client.base_url}{path}", content=content, headers=headers, timeout=60)


def line(response: httpx.Response) -> str:
    message = response.json()["error"]["message"]
    assert message and "\n" not in message and len(message) < 4000
    return str(message)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "body: Field required"),
        (b'{"model": ', "body: is no JSON: Expecting value at character 10"),
        (b"\xff\xfe{}", "body: is no JSON: "),
        (b"[]", "body: Input should be a valid dictionary"),
        (b"[" * 100_000, "error parsing the body"),
        (b'{"model":"a","messages":[{"role":"user","content":"x"}],"temperature":NaN}', "temperature: "),
        (b'{"model":"a","messages":[{"role":"user","content":"\\ud800"}]}', "messages.0.content: half of a surrogate"),
        (b'{"model":"\\ud800","messages":[{"role":"user","content":"x"}]}', "model: half of a surrogate pair at char"),
    ],
)
def test_bodies_that_are_none(client: openai.OpenAI, raw: bytes, says: str) -> None:
    response = post(client, "chat/completions", raw=raw)
    assert response.status_code == 400
    assert says in line(response)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"max_tokens": 10**30}, "do not fit the model's 2048"),
        ({"max_tokens": "5"}, "max_tokens: Input should be a valid integer"),
        ({"max_tokens": True}, "max_tokens: Input should be a valid integer"),
        ({"max_tokens": 2.5}, "max_tokens: Input should be a valid integer"),
        ({"max_tokens": 3, "max_completion_tokens": 3}, "are the same: give one"),
        ({"temperature": -1}, "temperature: "),
        ({"temperature": "hot"}, "temperature: "),
        ({"n": 2}, "n: Input should be less than or equal to 1"),
        ({"logit_bias": {"1": 5}}, "logit_bias: Extra inputs are not permitted"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0"),
        ({"seed": 2**63}, "seed: Input should be less than 9223372036854775808"),
        ({"stop": [f"s{number}" for number in range(100)]}, "should have at most 16 items"),
        ({"stop": [None]}, "stop"),
        ({"stream": "maybe"}, "stream: Input should be a valid boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options is of a stream: it needs stream=true"),
        ({"stream": True, "stream_options": {"what": 1}}, "stream_options.what: Extra inputs are not permitted"),
        ({"top_logprobs": 5}, "top_logprobs needs logprobs=true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: "),
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role: Input should be 'system', 'user'"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}, "messages.0.content: "),
        ({"messages": [{"role": "user", "content": "x" * 10**7}]}, "10000000 bytes do not fit the model's 2048 tok"),
        ({"model": "layout"}, "not a prompt layout (system_prompt=3 is of another type)"),
        ({"model": "lineage"}, "lineage.json: lacks base_fingerprint"),
        ({"model": "nan"}, "has numbers that are not finite"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_values_of_other_kinds(client: openai.OpenAI, more: dict[str, Any], says: str) -> None:
    response = post(client, "chat/completions", {"model": "a", "messages": HI, "max_tokens": 3} | more)
    assert response.status_code == 400
    assert says in line(response)


@pytest.mark.parametrize("name", ["../a", "..", ".", "%2e%2e", "a/b", "/etc/passwd", "😀", "a\0b", "", "copy/", "\n"])
def test_names_that_are_paths_or_worse(client: openai.OpenAI, name: str) -> None:
    response = post(client, "chat/completions", {"model": name, "messages": HI})
    assert response.status_code == 404 and "not here; there are tiny, a, copy" in response.json()["error"]["message"]
    if name != "..":  # what lies there is said by its own line
        loaded = post(client, "load_lora_adapter", {"lora_name": name, "lora_path": "copy"})
        assert loaded.status_code == 400 and "letters, digits, dots" in loaded.text


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("../a", "must lie below"),
        ("link", "must lie below"),
        ("a\0b", "null byte"),
        ("y" * 10_000, "File name too long"),
        ("layout", "not a prompt layout"),
        ("nan", "not finite"),
        ("nothing", "no such folder"),
    ],
)
def test_folders_that_are_not_loaded(client: openai.OpenAI, path: str, says: str) -> None:
    response = post(client, "load_lora_adapter", {"lora_name": "new", "lora_path": path})
    assert response.status_code == 400 and says in response.json()["error"]["message"]
    assert post(client, "chat/completions", {"model": "new", "messages": HI}).status_code == 404


def test_the_base_keeps_its_name(client: openai.OpenAI) -> None:
    body = {"lora_name": "tiny", "lora_path": "copy", "load_inplace": True}
    assert "is the base's name" in line(post(client, "load_lora_adapter", body))


def test_null_is_what_is_left_out(client: openai.OpenAI) -> None:
    body = {"model": "a", "messages": HI, "max_tokens": 3}
    nulls = dict.fromkeys(("temperature", "top_p", "n", "seed", "stop", "stream", "stream_options", "logit_bias"))
    assert (
        post(client, "chat/completions", body | nulls).json()["choices"]
        == (post(client, "chat/completions", body).json()["choices"])
    )


def test_bodies_have_a_size(client: openai.OpenAI) -> None:
    large = b'{"model":"a","messages":[{"role":"user","content":"' + b"x" * 2**24 + b'"}]}'
    assert post(client, "chat/completions", raw=large).status_code == 413
    endless = httpx.post(f"{client.base_url}chat/completions", content=iter([b"{", b"}"]), timeout=60)
    assert endless.status_code == 411 and "must say its length" in line(endless)


def test_other_paths_and_verbs_are_said_in_the_same_form(client: openai.OpenAI) -> None:
    assert httpx.get(f"{client.base_url}nothing").json()["error"]["message"] == "Not Found"
    assert httpx.get(f"{client.base_url}chat/completions").json()["error"]["message"] == "Method Not Allowed"


def test_a_model_is_retrieved_by_name(client: openai.OpenAI) -> None:
    assert client.models.retrieve("copy").model_dump()["parent"] == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_others_are_answered_while_a_huge_prompt_is_refused(client: openai.OpenAI) -> None:
    huge = {"model": "a", "messages": [{"role": "user", "content": "x" * 10**7}]}
    with ThreadPoolExecutor(4) as pool:
        refused = [pool.submit(post, client, "chat/completions", huge) for _ in range(3)]
        started = time.monotonic()
        assert ask(client, "a", "hi", 2)
        assert time.monotonic() - started < 30
        assert {future.result().status_code for future in refused} == {400}


def test_an_adapter_unloaded_or_changed_in_use_ends_as_it_began(client: openai.OpenAI, place: Path) -> None:
    """Its folder is written anew and loaded in place while a stream of it runs, then the name is taken away."""
    folder = place / "dir" / "moving"
    shutil.copytree(place / "a", folder)
    (folder / "lineage.json").unlink()
    assert post(client, "load_lora_adapter", {"lora_name": "used", "lora_path": "moving"}).status_code == 200
    expected = ask(client, "a", "List all.", 200)
    stream = client.chat.completions.create(
        model="used", messages=[{"role": "user", "content": "List all."}], max_tokens=200, stream=True
    )
    pieces = [next(iter(stream)).choices[0].delta.content or ""]
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: -3 * value for name, value in weights.items()}, folder / "adapter_model.safetensors")
    assert post(client, "load_lora_adapter", {"lora_name": "used", "load_inplace": True}).status_code == 200
    changed = ask(client, "used", "List all.", 12)
    assert post(client, "unload_lora_adapter", {"lora_name": "used"}).status_code == 200
    assert post(client, "chat/completions", {"model": "used", "messages": HI}).status_code == 404
    pieces += [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == expected and not expected.startswith(changed)
    shutil.rmtree(folder)
